"""Limits of a model's layers, memory and time. They are checked before the model is built in memory.

A model's folder may be untrusted: by a few digits in its configuration, a model could take hours or all of the
machine's memory. In this file, `name` is the configuration's name or path, for error messages.
"""

from __future__ import annotations

from typing import Any

_LAYERS = 100  # the most layers of all blocks together, since building modules takes time, even on the meta device
_BYTES = 8 * 2**30  # the most bytes of the weights, and the most of one sample's activations, in float32
CLASSES = 1_000_000  # the most classes
_SIDE = 2**16  # the largest value of most numbers in a transformer's configuration, such as its sample_size
_PRODUCTS = 10**13  # the most multiplications of a call of the model with one sample: some minutes on one core


def check_layers(config: dict[str, Any], name: str) -> None:
    """Raises ValueError, naming `name`, unless `config` has few enough layers to build a model in a few seconds."""
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block", 2)
    blocks = len(widths) if isinstance(widths, list | tuple) else 4  # diffusers' default of a UNet2DModel
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= _LAYERS // max(1, blocks):
        raise ValueError(
            f"model: {name} has layers_per_block {layers!r} in {blocks} blocks, expected 1 to {_LAYERS} layers in all"
        )


def check_weights(module: Any, name: str) -> None:
    """Raises ValueError if the weights of a module, which may be on the meta device, take more than _BYTES."""
    weights = 4 * sum(value.numel() for value in module.parameters())
    if weights > _BYTES:
        raise ValueError(f"model: {name} has {_gib(weights)} of weights, expected at most {_gib(_BYTES)}")


def check_unet(unet: Any, size: tuple[int, int], name: str) -> None:
    """Raises ValueError if the down blocks can't halve the sides of samples, or if a sample takes more memory than
    _BYTES or more time than _PRODUCTS.

    Args:
        unet: a UNet2DModel, which may be on the meta device.
        size: (height, width) of a sample.
    """
    config, text = unet.config, " by ".join(map(str, size))
    widths, layers = config.block_out_channels, config.layers_per_block
    smallest = 2 ** (len(widths) - 1)  # each down block except the last halves the sides, and an up block doubles them
    if any(side % smallest for side in size):
        raise ValueError(
            f"model: {name} has samples of {text}, expected multiples of {smallest} for {len(widths)} blocks"
        )
    pixels = [size[0] * size[1] // 4**level for level in range(len(widths))]
    attends = ["Attn" in str(kind) for kind in config.down_block_types]
    attends[-1] |= bool(config.mid_block_type and config.add_attention)
    # The float32 numbers in memory at a time: the outputs of each down block's layers and of its downsampling, which
    # the up blocks read later; a few tensors of the current layer; the sample and the model's output.
    values = [width * count for width, count in zip(widths, pixels, strict=True)]
    numbers = (layers + 1) * sum(values) + 6 * max(values) + (config.in_channels + config.out_channels) * pixels[0]
    # A down block has `layers` layers, and an up block one more. A layer has two 3 by 3 convolutions. In some blocks it
    # also has attention, which multiplies queries by keys and the result by values.
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
"""{name: diffusers' default} of the numbers in the configuration of a DiTTransformer2DModel."""


def check_transformer(config: dict[str, Any], name: str) -> None:
    """Raises ValueError, naming `name`, unless `config` describes a DiTTransformer2DModel within the limits.

    Such a model can be built in a few seconds, and a sample takes at most the memory _BYTES and the time of _PRODUCTS.
    """
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
    # The float32 numbers in memory: a block's activations (its hidden layer has four times the width); the products of
    # queries and keys; the sample and the model's output, which may have twice the channels.
    numbers = 12 * tokens * width + entries["num_attention_heads"] * tokens**2 + 3 * channels * size**2
    products = entries["num_layers"] * (12 * tokens * width**2 + 2 * width * tokens**2 + 6 * width**2)
    _check_sample(numbers, products, f"{size} by {size}", name)


def check_decoder(vae: Any, size: tuple[int, int], name: str) -> None:
    """Raises ValueError if decoding one sample's latents takes more memory than _BYTES or more time than _PRODUCTS.

    Args:
        vae: an AutoencoderKL, which may be on the meta device. All its up blocks are UpDecoderBlock2D.
        size: (height, width) of the latents.
    """
    widths, layers = list(reversed(vae.config.block_out_channels)), vae.config.layers_per_block
    latents = size[0] * size[1]
    # The numbers of pixels before and after the upsampling of each block. The last block does not upsample.
    before = [latents * 4**level for level in range(len(widths))]
    after = [*before[1:], before[-1]]
    numbers = 6 * max(width * count for width, count in zip(widths, after, strict=True)) + latents**2
    products = 2 * widths[0] * latents**2 + sum(
        9 * width**2 * (2 * (layers + 2) * count + above)
        for width, count, above in zip(widths, before, after, strict=True)
    )
    _check_sample(numbers, products, f"latents of {size[0]} by {size[1]}", name)


def _check_sample(numbers: int, products: int, text: str, name: str) -> None:
    """Raises ValueError, naming `name`, if a sample takes too much memory or time.

    Args:
        numbers: how many float32 numbers a call with one sample has in memory.
        products: how many multiplications this call takes.
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
