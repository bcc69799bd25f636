"""Fits the numbers of a table's rows at fixed timesteps by least squares, row by row.

At fixed timesteps, a row is a weighted sum of terms: the predicted clean sample, the sample, up to three clean samples
that earlier rows predicted, and with guidance the clean sample of the unconditional output. The row's weights are
chosen such that its result is nearest to the teacher's trajectory at the next timestep.
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
RIDGE = 1e-5  # the strength of the ridge that pulls a weight towards Euler's, relative to the power of its term
FLOOR = 0.1  # as a share of the mean error: smaller errors give samples about the same weight in a fit
# For each row, float64 (terms,): the weights of x0, x, earlier rows' clean samples (newest first) and, with guidance,
# the clean sample of the unconditional output.
Weights = list[Tensor]


class Equations:
    """The normal equations of one row, separate for each sample, so that outlying samples can get less weight."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, terms: Sequence[Tensor], target: Tensor) -> None:
        """Adds samples: the terms that a row sums, and the target of the sum, each (batch, ...)."""
        x = torch.stack([term.flatten(1).double() for term in terms], -1)
        y = target.flatten(1).double()
        gram, right = torch.einsum("bek,bel->bkl", x, x), torch.einsum("bek,be->bk", x, y)
        self._parts.append(tuple((part / y.shape[1]).cpu() for part in (gram, right, y.square().sum(1))))  # type: ignore[arg-type]

    def solve(self, prior: Tensor) -> Tensor:
        """The weights, float64 (terms,). Where the samples do not determine them, they are near `prior`.

        A second solution weights each sample by the inverse of its error in the first, since a few outlying
        trajectories would spoil a plain fit.
        """
        gram, right, power = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        of_sample = torch.ones_like(power)
        for _ in range(2):
            total = torch.einsum("b,bkl->kl", of_sample, gram)
            sizes = total.diagonal()
            ridge = RIDGE * (sizes + RIDGE * sizes.max())  # above 0 even for a term that is 0 in all samples
            projection = torch.einsum("b,bk->k", of_sample, right) + ridge * prior
            weights = torch.linalg.solve(total + ridge.diag(), projection)
            explained = 2 * right @ weights - torch.einsum("k,bkl,l->b", weights, gram, weights)
            of_sample = inverse_errors((power - explained).clamp(min=0).sqrt())
        return weights


def inverse_errors(error: Tensor) -> Tensor:
    """The weights of samples with these errors."""
    return 1 / (error + FLOOR * error.mean() + 1e-12)


@dataclass(frozen=True)
class State:
    """The state of a batch before a row.

    Attributes:
        x: the samples.
        predicted: the clean samples that earlier rows predicted, the newest first.
    """

    loops: Loops
    x: Tensor
    predicted: tuple[Tensor, ...] = ()


class Rows:
    """Rows at fixed timesteps, whose weights are fitted.

    Args:
        diffusion: the diffusion of the rows.
        timesteps: timesteps of its schedule, descending.
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

    def terms(self, row: int, state: State) -> list[Tensor]:
        """The terms that the row sums. This calls the model once."""
        terms = [state.loops.run(self._to_x0[row : row + 1], noise=state.x), state.x, *state.predicted[:HISTORY]]
        unconditional = state.loops.unconditional()
        if unconditional is not None:
            terms.append(self.base.a[row].item() * state.x + self.base.b[row].item() * unconditional)
        return terms

    def begin(self, trajectory: Trajectory) -> tuple[State, list[Tensor]]:
        """The state of a batch before the first row, and the terms of that row, which do not depend on any weights."""
        state = State(trajectory.batch.loops, trajectory.batch.noise * self._begins_with)
        first = trajectory.first_terms
        if self.timesteps[0] not in first:
            first[self.timesteps[0]] = self.terms(0, state)
        return state, first[self.timesteps[0]]

    def finish(self, weights: Weights, state: State, terms: list[Tensor], row: int = 0) -> tuple[list[State], Tensor]:
        """Takes the rows from `row` on. Returns the batch's state before each of them, and the final samples.

        terms: those of row `row`.
        """
        states = [state]
        for number in range(row, len(self)):
            state = _next(state, terms, weights[number])
            if number + 1 < len(self):
                terms = self.terms(number + 1, state)
                states.append(state)
        return states, state.x

    def table(self, weights: Weights) -> StepTable:
        """The step table of the rows with these weights."""
        return with_weights(self.base, weights)


def euler_weights(base: StepTable, row: int, terms: int) -> Tensor:
    """The weights of a row of Euler's table `base`. terms: how many terms the row has."""
    weights = base.a.new_zeros(terms)
    weights[0], weights[1] = base.c0[row], base.c1[row]
    return weights


def with_weights(base: StepTable, weights: Weights) -> StepTable:
    """Euler's table `base`, with these weights in its first rows."""
    columns: dict[str, Any] = {name: getattr(base, name).clone() for name in ("c0", "c1", "cu", "h1", "h2", "h3", "k0")}
    for row, of_terms in enumerate(weights):
        columns["c0"][row], columns["c1"][row] = of_terms[:2]
        slots = min(row, HISTORY)
        for slot in range(slots):
            columns[f"h{slot + 1}"][row] = of_terms[2 + slot]
        if len(of_terms) > 2 + slots:  # the last term is the clean sample of the unconditional output, a x + b u
            columns["c1"][row] += of_terms[-1] * base.a[row]
            columns["cu"][row] = of_terms[-1] * base.b[row]
    columns["k0"][:-1] = 1
    return replace(base, c2=None, g1=None, **columns)


def _next(state: State, terms: Sequence[Tensor], weights: Tensor) -> State:
    """The state after a row with these terms and weights."""
    x = sum(weight * term.double() for weight, term in zip(weights.tolist(), terms, strict=True))
    assert isinstance(x, Tensor)
    return State(state.loops, x.to(state.x.dtype), (terms[0], *state.predicted)[:HISTORY])


def fit(rows: Rows, trajectories: Sequence[Trajectory]) -> tuple[Weights, Tensor]:
    """Fits the weights row by row. Returns them and the errors of the final samples.

    Each row starts from the result of the rows before it, not from the teacher's trajectory, and corrects their
    errors.
    """
    starts = [rows.begin(trajectory) for trajectory in trajectories]
    states, terms, weights = [state for state, _ in starts], [first for _, first in starts], []
    for row, arrives in enumerate(rows.arrives):
        if row:
            terms = [rows.terms(row, state) for state in states]
        equations = Equations()
        for of_batch, trajectory in zip(terms, trajectories, strict=True):
            equations.add(of_batch, trajectory.at(arrives))
        weights.append(equations.solve(euler_weights(rows.base, row, len(terms[0]))))
        states = [_next(state, of_batch, weights[-1]) for state, of_batch in zip(states, terms, strict=True)]
    return weights, torch.cat(
        [distance(end.x, trajectory.samples) for end, trajectory in zip(states, trajectories, strict=True)]
    )
