"""Helpers of the operators in `reference`: checks of arguments, each sample's row of a table, and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.checks import split_t
from ddpm_ext.ops.noise import Philox, check_randn, check_rng, fresh_rng
from ddpm_ext.ops.philox import normals


def ids_of_samples(rng: Philox, batch: int, device: torch.device) -> Tensor:
    """The sample ids of rng for a batch, int64 (batch,), on `device`."""
    check_rng(rng)
    if rng.sample_ids is not None:
        checks.per_sample("sample_ids", rng.sample_ids, batch, device, 2**56 - 1)
        return rng.sample_ids
    if rng.first_id + batch > 2**56:
        raise ValueError(f"sample_ids start at {rng.first_id} for a batch of {batch}, expected all in 0 <= id < 2^56")
    return torch.arange(rng.first_id, rng.first_id + batch, device=device)


def randn(
    shape: tuple[int, ...] | torch.Size,
    rng: Philox | None = None,
    *,
    draw: int | Tensor | None = None,
    stream: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Twin of ddpm_ext.randn, by the noise contract's formula in float64; draw may be an int64 tensor (batch,)."""
    sizes = check_randn(shape, None if isinstance(draw, Tensor) else draw, stream, dtype)
    batch, device = sizes[0], checks.device(device)
    if rng is None:
        rng = fresh_rng(device)
    ids = ids_of_samples(rng, batch, device)
    seed_tensor, seed_value, _, _, rng_stream, rng_draw, draw_data = rng.arguments(0, 0)
    seed = seed_value % 2**64 if seed_tensor is None else seed_tensor
    if draw is None:
        draw = rng_draw if draw_data is None else checks.integer("draw", int(draw_data), 2**32, "2^32")
    if not isinstance(draw, Tensor):
        draw = torch.full((batch,), draw, device=device)
    z = normals(torch.Size(sizes), seed, ids, rng_stream if stream is None else stream, draw)
    return z.to(dtype)


def check_samples(
    x_name: str, x: Tensor, table: Tensor, t: int | Tensor, others: dict[str, Tensor | None], lower: str = ""
) -> None:
    """Checks the arguments as the compiled operators do.

    Args:
        others: {name: tensor} of the tensors that must be like x.
        lower: the name of the tensor in `others` that may have a lower precision than x.
    """
    checks.samples(x_name, x)
    checks.tensor("table", table)
    row, index = split_t(t)
    if row is not None:
        checks.per_sample("t", row, len(x), x.device, len(table) - 1)
    elif not 0 <= index < len(table):
        raise ValueError(f"t is {index}, expected 0 <= t < {len(table)}")
    for name, y in others.items():
        if y is not None:
            checks.like(name, y, x_name, x, lower=name == lower)


def check_noise(x: Tensor, noise: Tensor | None, rng: Philox | None, add_noise: bool) -> None:
    checks.flag("add_noise", add_noise)
    if rng is not None:
        ids_of_samples(rng, len(x), x.device)
        if noise is not None:
            raise ValueError("noise and rng are both given, expected one of them")


def check_scale(name: str, scale: Tensor | None, x: Tensor) -> None:
    """Checks a tensor of one number for each sample: float32, or for a float64 x also float64."""
    if scale is None:
        return
    checks.tensor(name, scale)
    if scale.dtype not in (torch.float32, checks.compute_dtype(x.dtype)):
        raise TypeError(f"{name} has dtype {scale.dtype}, expected float32")
    if scale.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(scale.shape)}, expected ({len(x)},), one a sample")
    if scale.device != x.device:
        raise ValueError(f"{name} is on {scale.device}, expected the samples' device, {x.device}")


def columns(table: Tensor, t: int | Tensor, x: Tensor) -> list[Tensor]:
    """The columns of a table at each sample's row t, each of shape (batch, 1, ...)."""
    rows = table[t] if isinstance(t, Tensor) else table[t].expand(len(x), -1)
    return [column.reshape(-1, *[1] * (x.dim() - 1)) for column in rows.unbind(1)]


def affine(k0: Tensor, x: Tensor, k1: Tensor, y: Tensor) -> Tensor:
    """k0 x + k1 y. If k1 is -k0, it is k0 (x - y), as in the kernels: both products may be far larger than the sum."""
    return torch.where(k1 == -k0, k0 * (x - y), k0 * x + k1 * y)


def resolve_noise(x: Tensor, noise: Tensor | None, rng: Philox | None, stream: int, draw: int | Tensor) -> Tensor:
    """`noise`, or if it is None, the noise that rng draws.

    `stream` and `draw` are used where rng has no stream or draw of its own. With None, rng gets a fresh seed.
    """
    dtype = checks.compute_dtype(x.dtype)
    if noise is not None:
        return noise.to(dtype)
    rng = fresh_rng(x.device) if rng is None else rng
    draw_argument, stream_argument = draw if rng.draw is None else None, stream if rng.stream is None else None
    return randn(x.shape, rng, draw=draw_argument, stream=stream_argument, device=x.device, dtype=dtype)


def finish(result: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    """The result in x's dtype, written to `out` if it is not None."""
    result = result.to(x.dtype)
    return result if out is None else out.copy_(result)
