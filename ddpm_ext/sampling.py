"""The sampling loop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext import checks
from ddpm_ext.noise import STREAM_START, Philox, check_rng, fresh_rng
from ddpm_ext.tables import DeviceTables, StepTable, ddim_table, ddpm_table, spaced_timesteps

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion, Model

__all__ = ["loop", "make_tables"]

KEPT = 8  # how many loops' tables a GaussianDiffusion keeps


def unwrap(model_output: Any) -> Tensor:
    """A model's output as a tensor: itself, or its `.sample` (diffusers' models)."""
    if isinstance(model_output, Tensor):
        return model_output
    sample = getattr(model_output, "sample", None)
    if not isinstance(sample, Tensor):
        raise TypeError(f"the model's output is a {type(model_output).__name__}, expected a tensor or one as .sample")
    return sample


def make_tables(diffusion: GaussianDiffusion, sampler: str, steps: int | None, eta: float) -> DeviceTables:
    """The rows of p_sample_loop's options, checked. The last few are kept: a second loop uploads nothing, and so can be
    captured in a CUDA graph."""
    if isinstance(eta, bool) or not isinstance(eta, int | float):
        raise TypeError(f"eta is {eta!r}, expected a float")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta is {eta}, expected a finite eta >= 0")
    timestep = spaced_timesteps(diffusion.timesteps, steps)
    if sampler not in ("ddpm", "ddim"):
        raise ValueError(f"sampler is {sampler!r}, expected 'ddpm' or 'ddim'")
    key, kept = (sampler, len(timestep), float(eta)), diffusion._loops
    if key not in kept:
        if len(kept) == KEPT:
            kept.pop(next(iter(kept)))
        kept[key] = DeviceTables(_step_table(diffusion, sampler, timestep, float(eta)))
    return kept[key]


def _step_table(diffusion: GaussianDiffusion, sampler: str, timestep: Tensor, eta: float) -> StepTable:
    prediction = diffusion.prediction
    if sampler == "ddim":
        return ddim_table(diffusion.alphas_cumprod, timestep, prediction=prediction, eta=eta)
    return ddpm_table(
        diffusion.betas, diffusion.alphas_cumprod, timestep, prediction=prediction, variance=diffusion.variance
    )


def _record_every(record: str | int) -> int | None:
    """Every how many steps to record; None for the last alone, as a tensor."""
    if isinstance(record, str):
        if record not in ("all", "last"):
            raise ValueError(f"record is {record!r}, expected 'all', 'last' or an int k for every k-th step")
        return 1 if record == "all" else None
    return checks.integer("record", record, 2**63, "2^63", start=1)


def _model_device(model: Any) -> torch.device:
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


def _steps(count: int, progress: bool) -> Iterable[int]:
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return range(count)
        return tqdm(range(count), desc="sampling loop time step", total=count)
    return range(count)


def to_numpy(x: Tensor) -> np.ndarray:
    """A copy on the host; bfloat16, which numpy lacks, as float32."""
    x = x.float() if x.dtype == torch.bfloat16 else x
    return np.array(x.cpu().numpy())


@torch.no_grad()
def loop(
    backend: ModuleType,
    model: Model,
    shape: tuple[int, ...],
    tables: DeviceTables,
    *,
    clip: tuple[float, float] | None,
    rng: Philox | None,
    record: str | int,
    progress: bool,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> list[np.ndarray] | Tensor:
    """Takes the rows of `tables` one by one from pure noise: see GaussianDiffusion.p_sample_loop.

    A step is the model's call and one launch; two buffers take turns, so that no step allocates one.
    """
    shape = checks.shape(shape, least=1)
    every = _record_every(record)
    if rng is None:
        rng = fresh_rng()
    check_rng(rng)
    if rng.draw is not None or rng.stream is not None:
        raise ValueError(f"rng is {rng}, expected one without a draw or a stream of its own: each step has its own")
    device = _model_device(model) if device is None else checks.device(device)

    x = backend.randn(shape, rng, draw=0, stream=STREAM_START, device=device, dtype=dtype)
    spare = torch.empty_like(x)
    rows = tables.get("steps", x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    # every step's timesteps at once: the model gets a row of this, and no step makes a tensor
    timesteps = tables.get("timesteps", x.device, torch.int64)[:, None].repeat(1, shape[0])
    last = len(rows) - 1
    recorded = []
    for i in _steps(len(rows), progress):
        model_output = unwrap(model(x, timesteps[i]))
        x, spare = backend.reverse_step(x, model_output, rows, i, clip=clip, rng=rng, out=spare), x
        if every is not None and ((i + 1) % every == 0 or i == last):
            recorded.append(to_numpy(x))
    return x if every is None else recorded
