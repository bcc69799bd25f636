"""What the configuration of a UNet2DModel may ask for: layers, memory and time, found before anything is made.

A folder may be a stranger's, and a few digits in it may stand for hours or for all of the machine's memory.
"""

from __future__ import annotations

from typing import Any

_LAYERS = 100  # of all blocks: modules take time to make, also without memory
_BYTES = 8 * 2**30  # of the weights, and of one sample's activations, in float32
_PRODUCTS = 10**13  # multiplications in a call for one sample: some minutes of a core


def check_layers(config: dict[str, Any], name: str) -> None:
    """Raises ValueError, naming `name`, unless a model can be made by `config` in a few seconds."""
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block", 2)
    blocks = len(widths) if isinstance(widths, list | tuple) else 4  # diffusers' default
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= _LAYERS // max(1, blocks):
        raise ValueError(
            f"model: {name} has layers_per_block {layers!r} in {blocks} blocks, expected 1 to {_LAYERS} layers in all"
        )


def check_cost(unet: Any, size: tuple[int, int] | None, name: str) -> None:
    """Raises ValueError, naming `name`, where the weights, or a sample's activations or time, are beyond what models of
    images take, or the size does not fit the blocks.

    Args:
        unet: a UNet2DModel, which may be on the meta device.
        size: (height, width) of a sample; None: only the weights are looked at.
    """
    weights = 4 * sum(value.numel() for value in unet.parameters())
    if weights > _BYTES:
        raise ValueError(f"model: {name} has {_gib(weights)} of weights, expected at most {_gib(_BYTES)}")
    if size is None:
        return
    config, text = unet.config, " by ".join(map(str, size))
    widths, layers = config.block_out_channels, config.layers_per_block
    smallest = 2 ** (len(widths) - 1)  # each block but the last halves the sides, which are doubled on the way up
    if any(side % smallest for side in size):
        raise ValueError(
            f"model: {name} has samples of {text}, expected multiples of {smallest} for {len(widths)} blocks"
        )
    pixels = [size[0] * size[1] // 4**level for level in range(len(widths))]
    attends = ["Attn" in str(kind) for kind in config.down_block_types]
    attends[-1] |= bool(config.mid_block_type and config.add_attention)
    # What the way up reads again is kept, and there are a few tensors at work; the way up has one layer more.
    values = [width * count for width, count in zip(widths, pixels, strict=True)]
    kept = (layers + 1) * sum(values) + 6 * max(values) + (config.in_channels + config.out_channels) * pixels[0]
    products = sum(
        (2 * layers + 1) * (2 * 9 * width**2 * count + attended * 2 * width * count**2)
        for width, count, attended in zip(widths, pixels, attends, strict=True)
    )
    if 4 * kept > _BYTES:
        raise ValueError(
            f"model: {name} has samples of {text}, of which one takes about {_gib(4 * kept)}, expected at most "
            f"{_gib(_BYTES)}"
        )
    if products > _PRODUCTS:
        raise ValueError(
            f"model: {name} has samples of {text}, of which one takes about {products:.0e} multiplications in a call, "
            f"expected at most {_PRODUCTS:.0e}"
        )


def _gib(count: int) -> str:
    return f"{-(-count // 2**30)} GiB"
