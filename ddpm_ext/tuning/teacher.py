"""The teacher: a loop of many steps. Tables are fitted to its trajectories: the samples at each of its levels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.levels import flow, pure_noise
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tuning.errors import distance, typical
from ddpm_ext.tuning.loops import Batch

SAMPLER, STEPS = "deis", 100
TOLERANCE = 0.05  # the largest error of the teacher that is accepted, relative to the samples' root mean square
NEAREST = 4  # a trajectory is interpolated from this number of levels: the polynomial is cubic


@dataclass(frozen=True)
class Trajectory:
    """The samples of a batch at every level of the teacher's loop, from noise to the final samples.

    Attributes:
        batch: the batch.
        angles: float64 (levels,), atan(noise / signal) of each level, descending to 0.
        nodes: the samples at each level, float32 (levels, batch, ...), on the loop's device.
        first_terms: a cache for fit.Rows.begin, {timestep of a first row: the row's terms for this batch}.
    """

    batch: Batch
    angles: Tensor
    nodes: Tensor
    first_terms: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def samples(self) -> Tensor:
        """The teacher's final samples."""
        return self.nodes[-1]

    def errors_of(self, table: StepTable, dtype: torch.dtype = torch.float32) -> Tensor:
        """The distances between the samples of a loop with this table and the teacher's, float64 (batch,).

        dtype: the dtype of the loop's samples.
        """
        return distance(self.batch.loops.samples(table, self.batch, dtype), self.samples)

    def at(self, angle: float) -> Tensor:
        """The samples at the level of this angle, float64, interpolated by a polynomial through the nearest levels.

        Interpolation over the angle is accurate, since samples are smooth in it: they are cos(angle) x0 +
        sin(angle) eps, times the level's size sqrt(signal^2 + noise^2).
        """
        above = int(torch.searchsorted(-self.angles, -angle))
        first = max(0, min(above - NEAREST // 2, len(self.angles) - NEAREST))
        nodes = self.angles[first : first + NEAREST].tolist()
        samples = torch.zeros_like(self.nodes[0], dtype=torch.float64)
        for i, node in enumerate(nodes):
            others = nodes[:i] + nodes[i + 1 :]
            weight = math.prod((angle - other) / (node - other) for other in others)
            samples += weight * self.nodes[first + i]
        return samples


class Teacher:
    """Runs the teacher's loop, which is deterministic, and checks that it has converged.

    Attributes:
        calls, calls_to_check: the number of model calls for a batch in `trajectory`, and in `error_of`.
        between: whether the loop has timesteps that are not integers.
    """

    calls, calls_to_check = STEPS, STEPS // 2

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        self._diffusion = diffusion
        self._table = self._rows(STEPS)
        self.between = self._table.timestep.is_floating_point()

    def _rows(self, steps: int) -> StepTable:
        spacing = "trailing" if self._diffusion.schedule.scale is flow else "linspace"
        return make_loop_rows(self._diffusion, LoopOptions(sampler=SAMPLER, steps=steps, spacing=spacing)).table

    def trajectory(self, batch: Batch) -> Trajectory:
        """The trajectory of a batch. It takes the memory of a batch for each step.

        Raises:
            ValueError: the model returns values that are not finite.
        """
        loops, table = batch.loops, self._table
        nodes = [batch.noise * pure_noise(table.signal_now[0].item(), table.noise_now[0].item())]
        options = {name: value for name, value in loops.options.items() if name not in ("record", "progress")}
        for record in loops.diffusion.sample_progressive(
            loops.model, loops.shape, sampler=table, rng=batch.rng, device=loops.device, **options
        ):
            output = loops.model.output
            if output is None or not output.isfinite().all():
                raise ValueError(
                    f"model: at timestep {record.timestep:g} it returned values that are not finite, expected numbers"
                )
            nodes.append(record.x_t.clone())
        angles = torch.cat([angles_of(table.signal_now, table.noise_now), table.a.new_zeros(1)])
        return Trajectory(batch, angles, torch.stack(nodes))

    def error_of(self, trajectory: Trajectory) -> float:
        """The teacher's error: the distance between its samples with half its steps and with all its steps, relative to
        the samples' root mean square.

        Raises:
            ValueError: the error is too large for fitting tables to the teacher.
        """
        fewer = trajectory.batch.loops.samples(self._rows(STEPS // 2), trajectory.batch)
        remedy = "is the model trained, and are prediction, schedule and clip_denoised those that it was trained with?"
        return converged(fewer, trajectory.samples, STEPS, remedy)


def converged(fewer: Tensor, samples: Tensor, steps: int, remedy: str) -> float:
    """The distance between a teacher's samples with half its steps and with all its steps, relative to the samples'
    root mean square.

    Args:
        fewer, samples: the samples with half the steps, and with all steps.
        steps: the number of all steps.
        remedy: the end of the error's text.

    Raises:
        ValueError: the distance is above TOLERANCE.
    """
    size = samples.double().square().mean().sqrt().item()
    error = typical(distance(fewer, samples)) / max(size, 1e-12)
    if not error <= TOLERANCE:
        raise ValueError(
            f"the teacher has not converged: {-(-steps // 2)} and {steps} steps of {SAMPLER!r} end {error:.3g} of the "
            f"samples' size apart, expected at most {TOLERANCE}; {remedy}"
        )
    return error


def angles_of(signal: Tensor, noise: Tensor) -> Tensor:
    """atan(noise / signal) of each level, (levels,)."""
    return torch.atan2(noise, signal)
