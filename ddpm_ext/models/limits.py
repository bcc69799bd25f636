"""Limits on what a model's configuration may ask for: layers, memory and time, checked before a model is built.

A folder may be untrusted, and a few digits in its configuration can ask for hours or for all of the machine's memory.
"""

from __future__ import annotations

from typing import Any

_LAYERS = 100  # the most layers of all blocks together: modules take time to build, even on the meta device
_BYTES = 8 * 2**30  # the most bytes of the weights, and of one sample's activations, in float32
CLASSES = 1_000_000
_SIDE = 2**16  # the largest side of a sample, and the largest value of a transformer's other numbers
_PRODUCTS = 10**13  # the most multiplications in a call for one sample: some minutes on one core


def check_layers(config: dict[str, Any], name: str) -> None:
    """Raises ValueError, naming `name`, unless a model can be built from `config` in a few seconds."""
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block", 2)
    blocks = len(widths) if isinstance(widths, list | tuple) else 4  # diffusers' default
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= _LAYERS // max(1, blocks):
        raise ValueError(
            f"model: {name} has layers_per_block {layers!r} in {blocks} blocks, expected 1 to {_LAYERS} layers in all"
        )


def check_weights(module: Any, name: str) -> None:
    """Raises ValueError, naming `name`, if a module, which may be on the meta device, has too many weights."""
    weights = 4 * sum(value.numel() for value in module.parameters())
    if weights > _BYTES:
        raise ValueError(f"model: {name} has {_gib(weights)} of weights, expected at most {_gib(_BYTES)}")


def check_unet(unet: Any, size: tuple[int, int], name: str) -> None:
    """Raises ValueError, naming `name`, if a sample takes more memory or time than models of images do, or if its size
    does not fit the blocks.

    Args:
        unet: a UNet2DModel, which may be on the meta device.
        size: (height, width) of a sample.
    """
    config, text = unet.config, " by ".join(map(str, size))
    widths, layers = config.block_out_channels, config.layers_per_block
    smallest = 2 ** (len(widths) - 1)  # each block but the last halves the sides; the up blocks double them again
    if any(side % smallest for side in size):
        raise ValueError(
            f"model: {name} has samples of {text}, expected multiples of {smallest} for {len(widths)} blocks"
        )
    pixels = [size[0] * size[1] // 4**level for level in range(len(widths))]
    attends = ["Attn" in str(kind) for kind in config.down_block_types]
    attends[-1] |= bool(config.mid_block_type and config.add_attention)
    # The outputs of the down blocks are kept for the up blocks, and a few tensors are in use at a time. Up blocks have
    # one more layer.
    values = [width * count for width, count in zip(widths, pixels, strict=True)]
    numbers = (layers + 1) * sum(values) + 6 * max(values) + (config.in_channels + config.out_channels) * pixels[0]
    products = sum(
        (2 * layers + 1) * (2 * 9 * width**2 * count + attended * 2 * width * count**2)
        for width, count, attended in zip(widths, pixels, attends, strict=True)
    )
    _check_sample(numbers, products, text, name)


DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
"""The numbers in the configuration of a DiTTransformer2DModel, and diffusers' defaults."""


def check_transformer(config: dict[str, Any], name: str) -> None:
    """Raises ValueError, naming `name`, unless `config` describes a DiTTransformer2DModel that can be built in a few
    seconds and takes no more memory and time for a sample than models of images do."""
    entries = {entry: config.get(entry, default) for entry, default in DIT.items()}
    limits = {"num_layers": _LAYERS, "num_embeds_ada_norm": CLASSES}
    for entry, value in entries.items():
        highest = limits.get(entry, _SIDE)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
            raise ValueError(f"model: {name} has {entry} {value!r}, expected 1 to {highest}")
    size, channels, outputs = entries["sample_size"], entries["in_channels"], config.get("out_channels")
    if size % entries["patch_size"]:
        raise ValueError(
            f"model: {name} has sample_size {size}, expected a multiple of {entries['patch_size']}, a patch"
        )
    if outputs not in (None, channels, 2 * channels):
        raise ValueError(
            f"model: {name} has {outputs} output channels for {channels} of input, expected as many or twice as many"
        )
    tokens, width = (size // entries["patch_size"]) ** 2, entries["num_attention_heads"] * entries["attention_head_dim"]
    # A block's activations, with a hidden layer of four times the width; the products of queries and keys; the sample.
    numbers = 12 * tokens * width + entries["num_attention_heads"] * tokens**2 + 3 * channels * size**2
    products = entries["num_layers"] * (12 * tokens * width**2 + 2 * width * tokens**2 + 6 * width**2)
    _check_sample(numbers, products, f"{size} by {size}", name)


def check_decoder(vae: Any, size: tuple[int, int], name: str) -> None:
    """Raises ValueError, naming `name`, if decoding latents takes more memory or time than models of images do.

    Args:
        vae: an AutoencoderKL of plain blocks, which may be on the meta device.
        size: (height, width) of the latents.
    """
    widths, layers = list(reversed(vae.config.block_out_channels)), vae.config.layers_per_block
    latents = size[0] * size[1]
    # Each block but the last doubles the sides at its end: pixels inside the blocks, and after them.
    inside = [latents * 4**level for level in range(len(widths))]
    after = [*inside[1:], inside[-1]]
    numbers = 6 * max(width * count for width, count in zip(widths, after, strict=True)) + latents**2
    products = 2 * widths[0] * latents**2 + sum(
        9 * width**2 * (2 * (layers + 2) * count + above)
        for width, count, above in zip(widths, inside, after, strict=True)
    )
    _check_sample(numbers, products, f"latents of {size[0]} by {size[1]}", name)


def _check_sample(numbers: int, products: int, text: str, name: str) -> None:
    """Raises ValueError, naming `name`, if a sample takes too much memory or time.

    Args:
        numbers: how many float32 numbers are in memory.
        products: how many multiplications a sample takes.
        text: the sample's size, for the message.
    """
    if 4 * numbers > _BYTES:
        raise ValueError(
            f"model: {name} has samples of {text}, of which one takes about {_gib(4 * numbers)}, expected at most "
            f"{_gib(_BYTES)}"
        )
    if products > _PRODUCTS:
        raise ValueError(
            f"model: {name} has samples of {text}, of which one takes about {products:.0e} multiplications in a call, "
            f"expected at most {_PRODUCTS:.0e}"
        )


def _gib(count: int) -> str:
    return f"{-(-count // 2**30)} GiB"
