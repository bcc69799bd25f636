"""The operators in plain torch: slow, obvious, for any float dtype. Tests compare with them, and they are what
`backend="reference"` runs.

Each function is the twin of the one of the same name in `ops`, with the same arguments. Arithmetic is float64 for
float64 samples and float32 for all others; so are the tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.checks import split_t
from ddpm_ext.base.types import Clip
from ddpm_ext.ops.extended_inputs import Kind, names
from ddpm_ext.ops.gaussians import discretized_gaussian_log_likelihood
from ddpm_ext.ops.loss_kinds import check_options
from ddpm_ext.ops.noise import STREAM_FORWARD, STREAM_REVERSE, Philox, check_randn, check_rng, fresh_rng
from ddpm_ext.ops.philox import WORD, normals, philox4x32

__all__ = [
    "check_reverse_step",
    "diffusion_loss",
    "extended_step",
    "forward_process",
    "philox4x32",
    "posterior_mean",
    "predict_start",
    "randn",
    "reverse_step",
]


def _sample_ids(rng: Philox, batch: int, device: torch.device) -> Tensor:
    """int64 (batch,) on device."""
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
    if rng is None:
        rng = fresh_rng()
    batch, device = sizes[0], checks.device(device)
    ids = _sample_ids(rng, batch, device)
    own_seed, seed_value, _, _, own_stream, own_draw = rng.arguments(0, 0)
    seed = (seed_value if own_seed is None else int(own_seed)) % 2**64
    if draw is None:
        draw = own_draw
    if not isinstance(draw, Tensor):
        draw = torch.full((batch,), draw, device=device)
    z = normals(torch.Size(sizes), seed, ids, own_stream if stream is None else stream, draw)
    return z.to(dtype)


def _check(
    x_name: str, x: Tensor, table: Tensor, t: int | Tensor, others: dict[str, Tensor | None], lower: str = ""
) -> None:
    """Checks what the compiled operators check; `lower` names the tensor that may have a lower precision than x."""
    checks.samples(x_name, x)
    row, index = split_t(t)
    if row is not None:
        checks.per_sample("t", row, len(x), x.device, len(table) - 1)
    elif not 0 <= index < len(table):
        raise ValueError(f"t is {index}, expected 0 <= t < {len(table)}")
    for name, y in others.items():
        if y is not None:
            checks.like(name, y, x_name, x, lower=name == lower)


def _check_noise(x: Tensor, noise: Tensor | None, rng: Philox | None) -> None:
    if rng is not None:
        _sample_ids(rng, len(x), x.device)
        if noise is not None:
            raise ValueError("noise and rng are both given, expected one of them")


def _check_scale(name: str, scale: Tensor | None, x: Tensor) -> None:
    """Checks a tensor of one number for each sample, float32 or as x."""
    if scale is None:
        return
    checks.tensor(name, scale)
    if scale.dtype not in (torch.float32, checks.compute_dtype(x.dtype)):
        raise TypeError(f"{name} has dtype {scale.dtype}, expected float32")
    if scale.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(scale.shape)}, expected ({len(x)},), one a sample")
    if scale.device != x.device:
        raise ValueError(f"{name} is on {scale.device}, expected the samples' device, {x.device}")


def _rows(table: Tensor, t: int | Tensor, x: Tensor) -> list[Tensor]:
    """The columns of each sample's row, of shape (batch, 1, ...)."""
    rows = table[t] if isinstance(t, Tensor) else table[t].expand(len(x), -1)
    return [column.reshape(-1, *[1] * (x.dim() - 1)) for column in rows.unbind(1)]


def _draws(table: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
    """The draw of each sample's row, int64 (batch,)."""
    draws = table.view(torch.int64 if table.dtype == torch.float64 else torch.int32)[:, 6].long() & WORD
    row, index = split_t(t)
    return draws[row] if row is not None else draws[index].expand(len(x))


def _resolve_noise(x: Tensor, noise: Tensor | None, rng: Philox | None, stream: int, draw: Tensor) -> Tensor:
    if noise is not None:
        return noise.to(checks.compute_dtype(x.dtype))
    if rng is None:
        rng = fresh_rng()
    return randn(
        x.shape,
        rng,
        draw=draw if rng.draw is None else None,
        stream=stream if rng.stream is None else None,
        device=x.device,
        dtype=checks.compute_dtype(x.dtype),
    )


def _finish(result: Tensor, x: Tensor, out: Tensor | None) -> Tensor:
    result = result.to(x.dtype)
    return result if out is None else out.copy_(result)


def check_reverse_step(
    x_t: Tensor,
    table: Tensor,
    t: int | Tensor,
    *,
    noise: Tensor | None = None,
    rng: Philox | None = None,
    out: Tensor | None = None,
) -> None:
    """Twin of ops.check_reverse_step."""
    _check("x_t", x_t, table, t, {"noise": noise, "out": out})
    _check_noise(x_t, noise, rng)


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    table: Tensor,
    t: int | Tensor,
    *,
    clip: Clip | None = (-1.0, 1.0),
    noise: Tensor | None = None,
    rng: Philox | None = None,
    add_noise: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Twin of ops.reverse_step."""
    check_reverse_step(x_t, table, t, noise=noise, rng=rng, out=out)
    checks.like("model_output", model_output, "x_t", x_t, lower=True)
    dtype = checks.compute_dtype(x_t.dtype)
    a, b, c0, c1, c2, s, *_ = _rows(table.to(dtype), t, x_t)
    x, m = x_t.to(dtype), model_output.to(dtype)
    x_start = a * x + b * m
    if clip is not None:
        x_start = x_start.clamp(*clip)
    # Where c2 is 0, an infinite m must not make a NaN of a result that the clip keeps finite.
    prev = c0 * x_start + c1 * x + torch.where(c2 == 0, 0.0, c2 * m)
    if add_noise or noise is not None or rng is not None:
        prev = prev + s * _resolve_noise(x_t, noise, rng, STREAM_REVERSE, _draws(table, t, x_t))
    return _finish(prev, x_t, out)


def extended_step(
    x_t: Tensor,
    model_output: Tensor | None,
    table: Tensor,
    t: int | Tensor,
    *,
    clip: Clip | None = (-1.0, 1.0),
    noise: Tensor | None = None,
    rng: Philox | None = None,
    add_noise: bool = True,
    uncond_output: Tensor | None = None,
    output_scale: Tensor | None = None,
    model_variance: Tensor | None = None,
    log_variance: bool = True,
    x_start: Tensor | None = None,
    x_start_scale: Tensor | None = None,
    history: Tensor | None = None,
    gradient: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    out_copy: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> Tensor:
    """Twin of ops.extended_step, whose docstring has the equations."""
    inputs = {
        "uncond_output": uncond_output,
        "output_scale": output_scale,
        "model_variance": model_variance,
        "x_start": x_start,
        "x_start_scale": x_start_scale,
        "history": history,
        "gradient": gradient,
        "known": known,
        "mask": mask,
        "out_copy": out_copy,
        "x0_out": x0_out,
    }
    like_x = {"noise": noise, "out": out} | {name: inputs[name] for name in names(Kind.LIKE_X, Kind.RESULT)}
    _check("x_t", x_t, table, t, like_x)
    _check_noise(x_t, noise, rng)
    of_model = {"model_output": model_output} | {name: inputs[name] for name in names(Kind.OF_MODEL)}
    first, *others = [(name, given) for name, given in of_model.items() if given is not None] or [("x_t", x_t)]
    checks.like(*first, "x_t", x_t, lower=True)
    for name, given in others:
        checks.like(name, given, *first)
    for name in names(Kind.PER_SAMPLE):
        _check_scale(name, inputs[name], x_t)
    if uncond_output is not None and model_output is None:
        raise ValueError("uncond_output is given without model_output, expected both")
    if mask is not None and known is None:
        raise ValueError("mask is given without known, expected both")
    if known is not None and mask is None:
        raise ValueError("known is given without mask, expected both")
    dtype = checks.compute_dtype(x_t.dtype)

    def wide(given: Tensor | None) -> Tensor | None:
        return None if given is None else given.to(dtype)

    def factor(given: Tensor | None) -> Tensor | float:
        return 1.0 if given is None else given.to(dtype).reshape(-1, *[1] * (x_t.dim() - 1))

    a, b, c0, c1, c2, s, _, c3, l0, l1, g0, g1, k0, k1, w, _ = _rows(table.to(dtype), t, x_t)
    x, zero = x_t.to(dtype), torch.zeros((), dtype=dtype, device=x_t.device)
    m = zero if model_output is None else model_output.to(dtype)
    if (u := wide(uncond_output)) is not None:
        m = torch.where(w == 1, m, u + w * (m - u))
    m = m * factor(output_scale)
    x0 = a * x + b * m if x_start is None else x_start.to(dtype)
    x0 = x0 * factor(x_start_scale)
    if clip is not None:
        x0 = x0.clamp(*clip)
    # Where a factor is 0, its tensor may be infinite, or memory that was never written.
    rest = c1 * x + torch.where(c2 == 0, zero, c2 * m)
    if (h := wide(history)) is not None:
        rest = rest + torch.where(c3 == 0, zero, c3 * h)
    deviation = torch.ones_like(x)
    if (v := wide(model_variance)) is not None:
        deviation = (l0 + l1 * v).clamp(-87, 88).exp() if log_variance else v.clamp(2.0**-100, 2.0**100).sqrt()
    if (g := wide(gradient)) is not None:
        x0 = x0 + g0 * g
        rest = rest + deviation**2 * g1 * g
    prev = c0 * x0 + rest
    z = zero
    if add_noise or noise is not None or rng is not None:
        z = _resolve_noise(x_t, noise, rng, STREAM_REVERSE, _draws(table, t, x_t))
        # As in the plain step, given noise counts in every row.
        prev = prev + z * (s * deviation if noise is not None else torch.where(s == 0, zero, s * deviation))
    if mask is not None and known is not None:
        share = mask.to(dtype)
        prev = share * (k0 * known.to(dtype) + k1 * z) + (1 - share) * prev
    if x0_out is not None:
        x0_out.copy_(x0)
    if out_copy is not None:
        out_copy.copy_(prev)
    return _finish(prev, x_t, out)


def forward_process(
    x_start: Tensor,
    table: Tensor,
    t: int | Tensor,
    *,
    noise: Tensor | None = None,
    rng: Philox | None = None,
    add_noise: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """k0 x_start + k1 z. Twin of ops.forward_process."""
    _check("x_start", x_start, table, t, {"noise": noise, "out": out})
    _check_noise(x_start, noise, rng)
    dtype = checks.compute_dtype(x_start.dtype)
    k0, k1 = _rows(table.to(dtype), t, x_start)
    x_t = k0 * x_start.to(dtype)
    if add_noise or noise is not None or rng is not None:
        draw = t if isinstance(t, Tensor) else torch.full((len(x_start),), t, device=x_start.device)
        x_t = x_t + k1 * _resolve_noise(x_start, noise, rng, STREAM_FORWARD, draw)
    return _finish(x_t, x_start, out)


def _affine(x: Tensor, y: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    dtype = checks.compute_dtype(x.dtype)
    k0, k1 = _rows(table.to(dtype), t, x)
    return _finish(k0 * x.to(dtype) + k1 * y.to(dtype), x, None)


def predict_start(x_t: Tensor, noise: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    """k0 x_t + k1 noise. Twin of ops.predict_start."""
    _check("x_t", x_t, table, t, {"noise": noise}, lower="noise")
    return _affine(x_t, noise, table, t)


def posterior_mean(x_start: Tensor, x_t: Tensor, table: Tensor, t: int | Tensor) -> Tensor:
    """k0 x_start + k1 x_t. Twin of ops.posterior_mean."""
    _check("x_start", x_start, table, t, {"x_t": x_t}, lower="x_t")
    return _affine(x_start, x_t, table, t)


def diffusion_loss(
    model_output: Tensor,
    x_start: Tensor | None,
    table: Tensor,
    t: int | Tensor,
    *,
    loss: str = "mse",
    delta: float = 1.0,
    noise: Tensor | None = None,
    rng: Philox | None = None,
    reduction: str = "mean",
    variational: bool = False,
    detach_mean: bool = False,
) -> Tensor:
    """Twin of ops.diffusion_loss; float64 for float64 samples, and differentiable in all tensors, twice too."""
    checks.tensor("model_output", model_output)
    variance = None
    if variational:
        if x_start is None:
            raise ValueError("x_start is missing, expected one beside variational")
        checks.tensor("x_start", x_start)
        if model_output.dim() > 1 and x_start.dim() > 1 and model_output.shape[1] == 2 * x_start.shape[1]:
            model_output, variance = model_output.chunk(2, 1)
    x = model_output if x_start is None and noise is None else noise if x_start is None else x_start
    name = "model_output" if x is model_output else "noise" if x_start is None else "x_start"
    assert x is not None
    check_options(loss, delta, reduction)
    others = {"model_output": model_output, "x_start": x_start, "noise": noise}
    _check(name, x, table, t, others, lower="model_output")
    _check_noise(x, noise, rng)
    if noise is None and rng is None:
        raise ValueError("noise and rng are both None, expected the one that made the model's input")
    dtype = checks.compute_dtype(x.dtype)
    k0, k1, weight, *row = _rows(table.to(dtype), t, x)
    draw = t if isinstance(t, Tensor) else torch.full((len(x),), t, device=x.device)
    target = k1 * _resolve_noise(x, noise, rng, STREAM_FORWARD, draw)
    if x_start is not None:
        target = target + k0 * x_start.to(dtype)
    d = model_output.to(dtype) - target
    if loss == "mse":
        values = d**2
    elif loss == "l1":
        values = d.abs()
    else:
        values = torch.nn.functional.huber_loss(d, torch.zeros_like(d), reduction="none", delta=delta)
    values = weight * values
    if variational:
        d = d.detach() if detach_mean else d
        values = values + _bound(x.to(dtype), d, 0.0 if variance is None else variance.to(dtype), *row)
    losses = values.flatten(1).mean(1) if x.dim() > 1 else values
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _bound(
    x_start: Tensor,
    d: Tensor,
    v: Tensor | float,
    weight: Tensor,
    l0: Tensor,
    l1: Tensor,
    scale: Tensor,
    decoder: Tensor,
) -> Tensor:
    """`weight` times an element's term of the variational bound, eq. (5) of Ho et al. 2020; in the decoder's row,
    eq. (13)."""
    log_variance = l0 + l1 * v  # relative to the posterior's, except in the decoder's row
    g = -log_variance.clamp(-88, 87)
    divergence = (g.expm1() - g + g.exp() * scale * d**2) / 2
    likelihood = discretized_gaussian_log_likelihood(x_start, mean=x_start + scale * d, log_scale=log_variance / 2)
    return weight * torch.where(decoder != 0, -likelihood, divergence)
