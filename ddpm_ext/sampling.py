"""The sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddpm_ext import checks
from ddpm_ext.noise import STREAM_START, Philox, check_rng, fresh_rng
from ddpm_ext.samplers import SAMPLERS, WITH_ETA, check_eta
from ddpm_ext.spacing import Grid, karras_grid, log_snr_grid, make_grid, spaced_timesteps
from ddpm_ext.step_table import StepTable
from ddpm_ext.tables import DeviceTables

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion, Model

__all__ = ["Record", "loop", "make_tables", "walk"]

KEPT = 8  # how many loops' tables a GaussianDiffusion keeps
Kept = tuple[DeviceTables, StepTable]
SIGMA_GRIDS = {"karras": karras_grid, "log_snr": log_snr_grid}


def unwrap(model_output: Any) -> Tensor:
    """A model's output as a tensor: itself, or its `.sample` (diffusers' models)."""
    if isinstance(model_output, Tensor):
        return model_output
    sample = getattr(model_output, "sample", None)
    if not isinstance(sample, Tensor):
        raise TypeError(f"the model's output is a {type(model_output).__name__}, expected a tensor or one as .sample")
    return sample


def make_tables(
    diffusion: GaussianDiffusion,
    sampler: str | StepTable,
    steps: int | None,
    spacing: str,
    timesteps: Sequence[int] | Tensor | None,
    eta: float | None,
) -> DeviceTables:
    """The rows of p_sample_loop's options, checked. The last few are kept: a second loop uploads nothing, and so can be
    captured in a CUDA graph."""
    kept = diffusion._loops
    if isinstance(sampler, StepTable):
        others = {"steps": steps, "spacing": None if spacing == "linspace" else spacing}
        for name, value in {**others, "timesteps": timesteps, "eta": eta}.items():
            if value is not None:
                raise ValueError(f"{name} is {value!r} beside a StepTable as sampler, expected the table alone")
        if id(sampler) not in kept or kept[id(sampler)][1] is not sampler:
            # beside the table, so that no other gets its id
            _keep(kept, id(sampler), (_loop_tables(sampler, _levels(diffusion, sampler)), sampler))
        return kept[id(sampler)][0]

    checks.one_of("sampler", sampler, tuple(SAMPLERS))
    options: dict[str, object] = {"prediction": diffusion.prediction}
    if sampler == "ddpm":
        options["variance"] = diffusion.variance
    if eta is not None:
        eta = check_eta(eta)
        if sampler in WITH_ETA:
            options["eta"] = eta
        elif eta != 0:
            raise ValueError(f"eta is {eta}, but sampler {sampler!r} has none, expected None")
    # by more than equality: 1.0 and True must not pass for the 1 that is kept
    given = None if timesteps is None else torch.as_tensor(timesteps)
    chosen = None if given is None else (given.dtype, given.shape, tuple(given.flatten().tolist()))
    key = (sampler, eta, repr(steps), repr(spacing), chosen)
    if key not in kept:
        grid = _grid(diffusion, steps, spacing, timesteps)
        table = SAMPLERS[sampler](grid, **options)
        _keep(kept, key, (_loop_tables(table, grid.now), table))
    return kept[key][0]


def _keep(kept: dict[object, Kept], key: object, value: Kept) -> None:
    """The oldest makes room."""
    if key not in kept and len(kept) == KEPT:
        kept.pop(next(iter(kept)))
    kept[key] = value


def _loop_tables(table: StepTable, levels: Tensor | None) -> DeviceTables:
    """With how an image is noised for each row, where alphas_cumprod is known."""
    if levels is None:
        return DeviceTables(table)
    return DeviceTables(table, start=torch.stack([levels.sqrt(), (1 - levels).sqrt()], 1))


def _levels(diffusion: GaussianDiffusion, table: StepTable) -> Tensor | None:
    """alphas_cumprod where each row starts, of a table of the schedule's own timesteps."""
    t = table.timestep.cpu()
    own = not t.is_floating_point() and bool(((t >= 0) & (t < diffusion.timesteps)).all())
    return diffusion.alphas_cumprod[t] if own else None


def _grid(
    diffusion: GaussianDiffusion, steps: int | None, spacing: str, timesteps: Sequence[int] | Tensor | None
) -> Grid:
    if timesteps is not None:
        if steps is not None or spacing != "linspace":
            raise ValueError(f"timesteps are given beside steps={steps!r} and spacing={spacing!r}, expected alone")
        grid = make_grid(diffusion.alphas_cumprod, timesteps, betas=diffusion.betas)
        if not (grid.timestep[1:] < grid.timestep[:-1]).all():
            raise ValueError("timesteps do not descend, expected each below the one before")
        return grid
    if isinstance(spacing, str) and spacing in SIGMA_GRIDS:
        if steps is None:
            raise ValueError(f"steps is None, expected a number of steps for spacing {spacing!r}")
        return SIGMA_GRIDS[spacing](diffusion.alphas_cumprod, steps)
    chosen = spaced_timesteps(diffusion.timesteps, steps, spacing)
    return make_grid(diffusion.alphas_cumprod, chosen, betas=diffusion.betas)


class Record(NamedTuple):
    """A loop after one of its steps.

    step: 0 for the first; timestep: where it started from; x: its samples, on their device, in a buffer that the loop
    writes to again: copy what is to last.
    """

    step: int
    timestep: int | float
    x: Tensor


def _recorded_steps(record: str | int | Sequence[int], rows: int) -> set[int] | None:
    """Which steps to record; None for the last alone, as a tensor."""
    if isinstance(record, str):
        if record not in ("all", "last"):
            raise ValueError(f"record is {record!r}, expected 'all', 'last', an int k for every k-th step, or steps")
        return None if record == "last" else set(range(rows))
    if isinstance(record, Sequence):
        stop_name = f"{rows}, there being {rows} steps"
        steps = [checks.integer("record's step", step, rows, stop_name) for step in record]
        if len(set(steps)) < len(steps):
            raise ValueError(f"record is {record!r}, expected each step once")
        return set(steps)
    every = checks.integer("record", record, 2**63, "2^63", start=1)
    return {*range(every - 1, rows, every), rows - 1}


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


def walk(
    backend: ModuleType,
    model: Model,
    shape: tuple[int, ...],
    tables: DeviceTables,
    *,
    clip: tuple[float, float] | None,
    start: Tensor | None = None,
    strength: float = 1.0,
    rng: Philox | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Record]:
    """Takes the rows of `tables` one by one from pure noise: see GaussianDiffusion.sample_progressive.

    A step is the model's call and one launch; two buffers take turns, so that no step allocates one.
    """
    shape = checks.shape(shape, least=1)
    if rng is None:
        rng = fresh_rng()
    check_rng(rng)
    if rng.draw is not None or rng.stream is not None:
        raise ValueError(f"rng is {rng}, expected one without a draw or a stream of its own: each step has its own")
    first = first_row(len(tables), start, strength)
    rng_start = rng.of(STREAM_START, 0)
    if start is None:
        device = _model_device(model) if device is None else checks.device(device)
        x = backend.randn(shape, rng_start, device=device, dtype=dtype)
    else:
        _check_start(start, shape, device, dtype)
        scales = tables.find("start", start.device, torch.float64 if dtype == torch.float64 else torch.float32)
        if scales is None:
            raise ValueError("start is given, expected a sampler whose timesteps are the schedule's own, or its name")
        with torch.no_grad():
            x = backend.forward_process(start, scales, first, rng=rng_start)
    return _walk(backend, model, x, tables, first, clip, rng, progress)


def first_row(rows: int, start: Tensor | None, strength: float) -> int:
    """The row that a loop begins with: of the last `strength` of all."""
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise TypeError(f"strength is {strength!r}, expected a float")
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}, expected 0 < strength <= 1")
    if start is None and strength != 1:
        raise ValueError(f"strength is {strength} without a start, expected 1")
    taken = int(rows * strength + 1e-9)  # 0.29 of 100 is 29
    if taken == 0:
        raise ValueError(f"strength is {strength}, of {rows} steps not one, expected at least {1 / rows:.3g}")
    return rows - taken


def _check_start(start: object, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype) -> None:
    checks.tensor("start", start)
    assert isinstance(start, Tensor)
    if start.shape != shape:
        raise ValueError(f"start has shape {tuple(start.shape)}, expected {shape}")
    if start.dtype != dtype:
        raise TypeError(f"start has dtype {start.dtype}, expected that of the samples, {dtype}")
    if device is not None and start.device != checks.device(device):
        raise ValueError(f"start is on {start.device}, expected the samples' device, {device}")


@torch.no_grad()
def _walk(
    backend: ModuleType,
    model: Model,
    x: Tensor,
    tables: DeviceTables,
    first: int,
    clip: tuple[float, float] | None,
    rng: Philox,
    progress: bool,
) -> Iterator[Record]:
    spare = torch.empty_like(x)
    rows = tables.get("steps", x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    # every step's timesteps at once: the model gets a row of this, and no step makes a tensor
    timesteps = tables.timesteps(x.device)[:, None].repeat(1, len(x))
    told = tables.timesteps(torch.device("cpu")).tolist()
    for step in _steps(len(rows) - first, progress):
        i = first + step
        model_output = unwrap(model(x, timesteps[i]))
        x, spare = backend.reverse_step(x, model_output, rows, i, clip=clip, rng=rng, out=spare), x
        yield Record(step, told[i], x)


def loop(
    backend: ModuleType,
    model: Model,
    shape: tuple[int, ...],
    tables: DeviceTables,
    *,
    record: str | int | Sequence[int],
    callback: Callable[[Record], object] | None,
    start: Tensor | None,
    strength: float,
    **options: Any,
) -> list[np.ndarray] | Tensor:
    """walk() to its end, or to where `callback` returns true: see GaussianDiffusion.p_sample_loop."""
    rows = len(tables)
    chosen = _recorded_steps(record, rows - first_row(rows, start, strength))
    if callback is not None and not callable(callback):
        raise TypeError(f"callback is {callback!r}, expected a function of a Record")
    recorded: list[np.ndarray] = []
    listed = not isinstance(record, str | int)
    for now in walk(backend, model, shape, tables, start=start, strength=strength, **options):
        stop = callback is not None and callback(now)
        if chosen is not None and (now.step in chosen or (stop and not listed)):
            recorded.append(to_numpy(now.x))
        if stop:
            break
    return now.x if chosen is None else recorded
