"""The numbers of a table's rows at given timesteps, by least squares, row by row.

With its timesteps given, a row is linear in what it may add up: the predicted clean sample, the sample, up to three
clean samples that earlier rows predicted, and with guidance the clean sample by the unconditional output. The row's
weights are those that lead nearest to where the teacher's trajectory is at the next timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tuning.errors import distance
from ddpm_ext.tuning.loops import Loops
from ddpm_ext.tuning.teacher import Trajectory, angles_of

HISTORY = 3  # how many clean samples of earlier rows a row may read
RIDGE = 1e-5  # how much a weight is held back, relative to what it explains, from Euler's
FLOOR = 0.1  # of the mean error: errors below it count alike where trajectories are weighted by them
Weights = list[Tensor]  # of each row, float64 (terms,): of x0, x, the kept ones from the newest on, and the last


class Equations:
    """Normal equations of one row, kept apart for each sample, so that a few of them can be weighted down."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, terms: Sequence[Tensor], target: Tensor) -> None:
        """More samples: the terms that a row adds up, and what they should be, each (batch, ...)."""
        x = torch.stack([term.flatten(1).double() for term in terms], -1)
        y = target.flatten(1).double()
        gram, right = torch.einsum("bek,bel->bkl", x, x), torch.einsum("bek,be->bk", x, y)
        self._parts.append(tuple((part / y.shape[1]).cpu() for part in (gram, right, y.square().sum(1))))  # type: ignore[arg-type]

    def solve(self, prior: Tensor) -> Tensor:
        """The weights, float64 (terms,), near `prior` where the samples say nothing. A second solution weights each
        sample by the inverse of its error in the first, since a few outlying trajectories spoil a plain fit."""
        gram, right, power = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        of_sample = torch.ones_like(power)
        for _ in range(2):
            total = torch.einsum("b,bkl->kl", of_sample, gram)
            sizes = total.diagonal()
            ridge = RIDGE * (sizes + RIDGE * sizes.max())  # above 0 also for a term that is 0 everywhere
            given = torch.einsum("b,bk->k", of_sample, right) + ridge * prior
            weights = torch.linalg.solve(total + ridge.diag(), given)
            explained = 2 * right @ weights - torch.einsum("k,bkl,l->b", weights, gram, weights)
            of_sample = inverse_errors((power - explained).clamp(min=0).sqrt())
        return weights


def inverse_errors(error: Tensor) -> Tensor:
    return 1 / (error + FLOOR * error.mean() + 1e-12)


@dataclass(frozen=True)
class Place:
    """A batch before a row. x: its samples. kept: the clean samples that earlier rows predicted, the newest first."""

    loops: Loops
    x: Tensor
    kept: tuple[Tensor, ...] = ()


class Rows:
    """The rows at given timesteps, whose weights are to be found.

    Args:
        diffusion: what the rows are for.
        timesteps: of its schedule, descending.
    """

    def __init__(self, diffusion: GaussianDiffusion, timesteps: Sequence[int]) -> None:
        self.diffusion, self.timesteps = diffusion, tuple(timesteps)
        rows = make_loop_rows(diffusion, LoopOptions(sampler="euler", timesteps=self.timesteps))
        self.base, self._begins_with = rows.table, rows.pure_noise
        ones = torch.ones_like(self.base.a)
        self._to_x0 = replace(self.base, c0=ones, c1=torch.zeros_like(ones))
        after = angles_of(self.base.signal_after, self.base.noise_after)
        self.arrives = [*after[:-1].tolist(), 0.0]

    def __len__(self) -> int:
        return len(self.timesteps)

    def terms(self, row: int, place: Place) -> list[Tensor]:
        """What the row adds up, by one call of the model."""
        terms = [place.loops.run(self._to_x0[row : row + 1], noise=place.x), place.x, *place.kept[:HISTORY]]
        unconditional = place.loops.unconditional()
        if unconditional is not None:
            terms.append(self.base.a[row].item() * place.x + self.base.b[row].item() * unconditional)
        return terms

    def begin(self, trajectory: Trajectory) -> tuple[Place, list[Tensor]]:
        """Where a batch is before the first row, and that row's terms, which no weights change."""
        place = Place(trajectory.batch.loops, trajectory.batch.noise * self._begins_with)
        first = trajectory.first_terms
        if self.timesteps[0] not in first:
            first[self.timesteps[0]] = self.terms(0, place)
        return place, first[self.timesteps[0]]

    def finish(self, weights: Weights, place: Place, terms: list[Tensor], row: int = 0) -> tuple[list[Place], Tensor]:
        """Takes the rows from `row` on, whose terms are given: where the batch is before each, and the last samples."""
        places = [place]
        for number in range(row, len(self)):
            place = _next(place, terms, weights[number])
            if number + 1 < len(self):
                terms = self.terms(number + 1, place)
                places.append(place)
        return places, place.x

    def table(self, weights: Weights) -> StepTable:
        """The rows with these weights, as a loop takes them."""
        return with_weights(self.base, weights)


def euler_weights(base: StepTable, row: int, terms: int) -> Tensor:
    """The weights of a row of Euler's table `base`."""
    weights = base.a.new_zeros(terms)
    weights[0], weights[1] = base.c0[row], base.c1[row]
    return weights


def with_weights(base: StepTable, weights: Weights) -> StepTable:
    """Euler's table `base`, the first rows of which have these weights."""
    columns: dict[str, Any] = {name: getattr(base, name).clone() for name in ("c0", "c1", "cu", "h1", "h2", "h3", "k0")}
    for row, own in enumerate(weights):
        columns["c0"][row], columns["c1"][row] = own[:2]
        kept = min(row, HISTORY)
        for slot in range(kept):
            columns[f"h{slot + 1}"][row] = own[2 + slot]
        if len(own) > 2 + kept:  # the clean sample by the unconditional output, a x + b u
            columns["c1"][row] += own[-1] * base.a[row]
            columns["cu"][row] = own[-1] * base.b[row]
    columns["k0"][:-1] = 1
    return replace(base, c2=None, g1=None, **columns)


def _next(place: Place, terms: Sequence[Tensor], weights: Tensor) -> Place:
    x = sum(weight * term.double() for weight, term in zip(weights.tolist(), terms, strict=True))
    assert isinstance(x, Tensor)
    return Place(place.loops, x.to(place.x.dtype), (terms[0], *place.kept)[:HISTORY])


def fit(rows: Rows, trajectories: Sequence[Trajectory]) -> tuple[Weights, Tensor]:
    """Row by row: the weights, and the errors of the samples that they end with.

    Each row starts where the rows before it arrive, and not where the teacher is, so that it corrects them.
    """
    begun = [rows.begin(trajectory) for trajectory in trajectories]
    places, terms, weights = [place for place, _ in begun], [first for _, first in begun], []
    for row, arrives in enumerate(rows.arrives):
        if row:
            terms = [rows.terms(row, place) for place in places]
        equations = Equations()
        for own, trajectory in zip(terms, trajectories, strict=True):
            equations.add(own, trajectory.at(arrives))
        weights.append(equations.solve(euler_weights(rows.base, row, len(terms[0]))))
        places = [_next(place, own, weights[-1]) for place, own in zip(places, terms, strict=True)]
    return weights, torch.cat([distance(at.x, own.samples) for at, own in zip(places, trajectories, strict=True)])
