"""The rows that a sampling loop's options mean, on the devices where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.tables.on_device import StepDeviceTables
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA, check_eta, repaint
from ddpm_ext.tables.spacing import Grid, karras_grid, log_snr_grid, make_grid, spaced_timesteps
from ddpm_ext.tables.step_table import COLUMNS, StepTable

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion

__all__ = ["Kind", "LoopTables", "make_tables"]

KEPT = 8  # how many loops' tables a GaussianDiffusion keeps
SIGMA_GRIDS = {"karras": karras_grid, "log_snr": log_snr_grid}
LEARNED = ("learned", "learned_range", "learned_variance")


class Kind(NamedTuple):
    """What a row asks for. asks: the model at all; guided: its unconditional output, too; keeps: its output beside the
    x0 that follows from it."""

    asks: bool
    guided: bool
    keeps: bool


@dataclass(frozen=True, eq=False)
class LoopTables:
    """A loop's rows.

    steps: as a StepTable; device: for the kernels; kinds, timesteps: of each row, on the host; variance: how the rows
    take the model's own variance: "log", "direct", or None.
    """

    steps: StepTable
    device: StepDeviceTables
    kinds: list[Kind]
    timesteps: list[int | float]
    variance: str | None

    def __len__(self) -> int:
        return len(self.kinds)


def make_tables(
    diffusion: GaussianDiffusion,
    sampler: str | StepTable,
    steps: int | None = None,
    spacing: str = "linspace",
    timesteps: Sequence[int] | Tensor | None = None,
    eta: float | None = None,
    *,
    guidance: Guidance | None = None,
    jumps: tuple[int, int] | None = None,
) -> LoopTables:
    """The rows of p_sample_loop's options, checked. The last few are kept: a second loop uploads nothing, and so can be
    captured in a CUDA graph.

    `jumps`: jump_length and jump_n_sample of RePaint's resampling.
    """
    kept = diffusion._loops
    scale = None if guidance is None else (guidance.scale, guidance.interval)
    options: dict[str, object] = {"prediction": "x0" if diffusion.prediction == "x_prev" else diffusion.prediction}
    if isinstance(sampler, StepTable):
        others = {"steps": steps, "spacing": None if spacing == "linspace" else spacing}
        for name, value in {**others, "timesteps": timesteps, "eta": eta}.items():
            if value is not None:
                raise ValueError(f"{name} is {value!r} beside a StepTable as sampler, expected the table alone")
        key: object = (id(sampler), repr(scale), jumps)
        if key not in kept or kept[key][1] is not sampler:
            # beside the table, so that no other gets its id
            _keep(kept, key, (_loop_tables(diffusion, sampler, guidance, jumps, False), sampler))
        return kept[key][0]

    if sampler not in tuple(SAMPLERS):
        raise ValueError(f"sampler is {sampler!r}, expected {' or '.join(map(repr, SAMPLERS))}, or a StepTable")
    if sampler == "ddpm":
        options["variance"] = diffusion.variance
    if eta is not None:
        eta = check_eta(eta)
        if sampler in WITH_ETA:
            options["eta"] = eta
        elif eta != 0:
            raise ValueError(f"eta is {eta}, but sampler {sampler!r} has none, expected None")
    # by more than equality: 1.0 and True must not pass for the 1 that is kept
    given = timesteps
    if not (given is None or isinstance(given, Tensor)):
        given = torch.as_tensor(given, device="cpu")
    chosen = None if given is None else (given.dtype, given.shape, tuple(given.flatten().tolist()))
    key = (sampler, eta, repr(steps), repr(spacing), chosen, repr(scale), jumps)
    if key not in kept:
        table = SAMPLERS[sampler](_grid(diffusion, steps, spacing, timesteps), **options)
        if diffusion.prediction == "x_prev":
            table = _from_x_prev(diffusion, table)
        learned = sampler == "ddpm" and diffusion.variance in LEARNED
        _keep(kept, key, (_loop_tables(diffusion, table, guidance, jumps, learned), table))
    return kept[key][0]


def _from_x_prev(diffusion: GaussianDiffusion, table: StepTable) -> StepTable:
    """Rows for a model's x0 as rows for the mean of q(x_{t-1} | x_t, x_0): x0 = a x + b m, whatever steps are left out.

    The mean that a model learned is that of the schedule's own step, not of the longer one that a loop takes.
    """
    t = table.timestep
    if t.is_floating_point():
        raise ValueError("prediction is 'x_prev', expected a spacing whose timesteps are the schedule's own")
    b = 1 / diffusion.posterior_mean_coef1[t]
    a = -diffusion.posterior_mean_coef2[t] * b
    columns = {name: getattr(table, name) for name in COLUMNS}
    return StepTable(**columns | {"a": a, "b": b, "c1": table.c1 + a * table.c2, "c2": b * table.c2})


Kept = tuple[LoopTables, StepTable]


def _keep(kept: dict[object, Kept], key: object, value: Kept) -> None:
    """The oldest makes room."""
    if key not in kept and len(kept) == KEPT:
        kept.pop(next(iter(kept)))
    kept[key] = value


def _loop_tables(
    diffusion: GaussianDiffusion,
    table: StepTable,
    guidance: Guidance | None,
    jumps: tuple[int, int] | None,
    learned: bool,
) -> LoopTables:
    table = table.to("cpu")
    if jumps is not None:
        table = repaint(table, jump_length=jumps[0], jump_n_sample=jumps[1])
    if table.c3[0] != 0:
        raise ValueError(f"sampler's first row has c3 {table.c3[0]}, but there is no step before it, expected 0")
    scales = torch.ones_like(table.a) if guidance is None else guidance.scales(table.timestep)
    asks = (table.b != 0) | (table.c2 != 0)
    columns = (asks, asks & (scales != 1), table.c2 != 0)
    kinds = [Kind(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    levels = _levels(diffusion, table)
    others = {} if levels is None else {"start": torch.stack([levels.sqrt(), (1 - levels).sqrt()], 1)}
    return LoopTables(
        table,
        StepDeviceTables(table, scales, **others),
        kinds,
        table.timestep.tolist(),
        _variance(diffusion, table, learned),
    )


def _variance(diffusion: GaussianDiffusion, table: StepTable, learned: bool) -> str | None:
    """How the rows take the model's own variance. `learned`: that they do."""
    log = bool((table.l1 != 0).any())
    # a standard deviation of 1 where none is told: only what multiplies a learned one
    learned = learned or log or (diffusion.variance == "learned_variance" and bool((table.s == 1).any()))
    if log and diffusion.variance not in ("learned", "learned_range"):
        raise ValueError(
            f"sampler has rows for the logarithm of a model's own variance (l1), but the variance is "
            f"{diffusion.variance!r}, expected 'learned' or 'learned_range'"
        )
    if not learned:
        return None
    return "direct" if diffusion.variance == "learned_variance" else "log"


def _levels(diffusion: GaussianDiffusion, table: StepTable) -> Tensor | None:
    """alphas_cumprod where each row starts: what the table says, or else of the schedule's own timesteps."""
    if bool(table.now.any()):
        return table.now.cpu()
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
