"""Fits the numbers of a table's rows at fixed timesteps by least squares, row by row.

At fixed timesteps, a row's result is a weighted sum of terms: the predicted clean sample, the sample, up to three clean
samples that earlier rows predicted, and the clean sample of the unconditional output if guidance gives the model the
batch twice. The least-squares fit brings the row's result as near as possible to the teacher's trajectory at the next
timestep.
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
RIDGE = 1e-5  # ridge regression pulls each weight to Euler's weight this strongly, relative to the term's mean square
FLOOR = 0.1  # is added to a sample's error, as a share of the mean error, so that no sample gets a very large weight
# The weights of each row's terms, float64 (terms,). The terms are the predicted clean sample x0, the sample x, earlier
# rows' clean samples (newest first) and, if there is one, the clean sample of the unconditional output.
Weights = list[Tensor]


class Equations:
    """The normal equations of the least-squares fit of one row.

    Each sample has equations of its own, so that samples with large errors can get less weight.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, terms: Sequence[Tensor], target: Tensor) -> None:
        """Adds samples: the terms that a row sums, and the target of the sum, each (batch, ...)."""
        x = torch.stack([term.flatten(1).double() for term in terms], -1)
        y = target.flatten(1).double()
        gram, right = torch.einsum("bek,bel->bkl", x, x), torch.einsum("bek,be->bk", x, y)
        self._parts.append(tuple((part / y.shape[1]).cpu() for part in (gram, right, y.square().sum(1))))  # type: ignore[arg-type]

    def solve(self, prior: Tensor) -> Tensor:
        """The weights of the terms, float64 (terms,). Weights that the samples do not determine are near `prior`.

        The equations are solved twice, since a few outlying samples would spoil a fit in which all samples count alike.
        The second time, each sample is weighted by the inverse of its error in the first solution.
        """
        gram, right, power = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        sample_weights = torch.ones_like(power)
        for _ in range(2):
            total = torch.einsum("b,bkl->kl", sample_weights, gram)
            sizes = total.diagonal()
            ridge = RIDGE * (sizes + RIDGE * sizes.max())  # above 0 even for a term that is 0 in all samples
            projection = torch.einsum("b,bk->k", sample_weights, right) + ridge * prior
            weights = torch.linalg.solve(total + ridge.diag(), projection)
            explained = 2 * right @ weights - torch.einsum("k,bkl,l->b", weights, gram, weights)
            sample_weights = inverse_errors((power - explained).clamp(min=0).sqrt())
        return weights


def inverse_errors(error: Tensor) -> Tensor:
    """The weight of each sample in a fit, about the inverse of its error."""
    return 1 / (error + FLOOR * error.mean() + 1e-12)


@dataclass(frozen=True)
class State:
    """A batch in a sampling loop, before one of the rows.

    Attributes:
        loops: the loops that call the model for this batch.
        x: the samples.
        predicted: the clean samples that earlier rows predicted, the newest first.
    """

    loops: Loops
    x: Tensor
    predicted: tuple[Tensor, ...] = ()


class Rows:
    """The rows of a table at fixed timesteps, for a fit of their weights.

    Args:
        diffusion: the diffusion that the samples follow.
        timesteps: timesteps of its schedule, descending.

    Attributes:
        euler_table: the table of Euler's method at these timesteps.
        angle_after: for each row, the level that it leads to, as the angle atan(noise / signal).
    """

    def __init__(self, diffusion: GaussianDiffusion, timesteps: Sequence[int]) -> None:
        self.diffusion, self.timesteps = diffusion, tuple(timesteps)
        rows = make_loop_rows(diffusion, LoopOptions(sampler="euler", timesteps=self.timesteps))
        self.euler_table, self._start_deviation = rows.table, rows.pure_noise
        ones = torch.ones_like(self.euler_table.a)
        self._to_x0 = replace(self.euler_table, c0=ones, c1=torch.zeros_like(ones))
        after = angles_of(self.euler_table.signal_after, self.euler_table.noise_after)
        self.angle_after = [*after[:-1].tolist(), 0.0]

    def __len__(self) -> int:
        return len(self.timesteps)

    def terms(self, row: int, state: State) -> list[Tensor]:
        """The terms of row `row` for a batch in `state`: the tensors that it sums. This calls the model once."""
        terms = [state.loops.run(self._to_x0[row : row + 1], noise=state.x), state.x, *state.predicted[:HISTORY]]
        unconditional = state.loops.unconditional()
        if unconditional is not None:
            terms.append(self.euler_table.a[row].item() * state.x + self.euler_table.b[row].item() * unconditional)
        return terms

    def begin(self, trajectory: Trajectory) -> tuple[State, list[Tensor]]:
        """The state of a batch before the first row, and the first row's terms.

        The terms do not depend on weights, so they are cached in the trajectory by the row's timestep.
        """
        state = State(trajectory.batch.loops, trajectory.batch.noise * self._start_deviation)
        first = trajectory.first_terms
        if self.timesteps[0] not in first:
            first[self.timesteps[0]] = self.terms(0, state)
        return state, first[self.timesteps[0]]

    def finish(self, weights: Weights, state: State, terms: list[Tensor], row: int = 0) -> tuple[list[State], Tensor]:
        """Runs the rows from row `row` to the last. Returns the batch's state before each row, and the final samples.

        terms: the terms of row `row`.
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
        return with_weights(self.euler_table, weights)


def euler_weights(euler_table: StepTable, row: int, terms: int) -> Tensor:
    """The weights, (terms,), with which row `row` is a step of Euler's method."""
    weights = euler_table.a.new_zeros(terms)
    weights[0], weights[1] = euler_table.c0[row], euler_table.c1[row]
    return weights


def with_weights(euler_table: StepTable, weights: Weights) -> StepTable:
    """A copy of `euler_table` with these weights in its first rows. All its rows but the last keep their x0."""
    columns: dict[str, Any] = {
        name: getattr(euler_table, name).clone() for name in ("c0", "c1", "cu", "h1", "h2", "h3", "k0")
    }
    for row, term_weights in enumerate(weights):
        columns["c0"][row], columns["c1"][row] = term_weights[:2]
        slots = min(row, HISTORY)
        for slot in range(slots):
            columns[f"h{slot + 1}"][row] = term_weights[2 + slot]
        if len(term_weights) > 2 + slots:  # the last term is the clean sample of the unconditional output, a x + b u
            columns["c1"][row] += term_weights[-1] * euler_table.a[row]
            columns["cu"][row] = term_weights[-1] * euler_table.b[row]
    columns["k0"][:-1] = 1
    return replace(euler_table, c2=None, g1=None, **columns)


def _next(state: State, terms: Sequence[Tensor], weights: Tensor) -> State:
    """The state after a row, which sums these terms with these weights."""
    x = sum(weight * term.double() for weight, term in zip(weights.tolist(), terms, strict=True))
    assert isinstance(x, Tensor)
    return State(state.loops, x.to(state.x.dtype), (terms[0], *state.predicted)[:HISTORY])


def fit(rows: Rows, trajectories: Sequence[Trajectory]) -> tuple[Weights, Tensor]:
    """Fits the weights row by row. Returns the weights and the errors of the final samples.

    Each row starts from the result of the fitted rows before it, not from the teacher's trajectory. So it also corrects
    their errors.
    """
    starts = [rows.begin(trajectory) for trajectory in trajectories]
    states, terms, weights = [state for state, _ in starts], [first for _, first in starts], []
    for row, angle_after in enumerate(rows.angle_after):
        if row:
            terms = [rows.terms(row, state) for state in states]
        equations = Equations()
        for batch_terms, trajectory in zip(terms, trajectories, strict=True):
            equations.add(batch_terms, trajectory.at(angle_after))
        weights.append(equations.solve(euler_weights(rows.euler_table, row, len(terms[0]))))
        states = [_next(state, batch_terms, weights[-1]) for state, batch_terms in zip(states, terms, strict=True)]
    return weights, torch.cat(
        [distance(end.x, trajectory.samples) for end, trajectory in zip(states, trajectories, strict=True)]
    )
