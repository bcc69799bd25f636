"""Fits all weights and timesteps of a table together, by the method of Gauss and Newton.

This fit minimizes the error of the final samples. It begins with the weights from fit.py, where each row only minimizes
the error at the next timestep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ext.tuning.errors import distance, typical
from ddpm_ext.tuning.fit import HISTORY, Rows, Weights, inverse_errors
from ddpm_ext.tuning.teacher import Trajectory

STEP = 1e-3  # a derivative with respect to a weight is a difference over this change of the weight
TIMESTEP = 0.01  # a derivative with respect to a timestep is a difference over about this share of the timestep
# The dampings of Levenberg and Marquardt: the second pair is tried if no change by the first pair reduces the error.
DAMPINGS = ((1e-2, 1e-3), (1.0, 1e-1))
ROUNDS, GAIN = 6, 0.005  # the most rounds; a round that reduces the error by less than the share GAIN is the last


class Fit(NamedTuple):
    """Rows with their weights, and the errors of the final samples of a loop with these rows."""

    rows: Rows
    weights: Weights
    errors: Tensor

    @property
    def error(self) -> float:
        return typical(self.errors)


def polish(
    rows: Rows,
    weights: Weights,
    trajectories: Sequence[Trajectory],
    check: Sequence[Trajectory],
    rounds: int = ROUNDS,
) -> Fit:
    """Reduces the error on `trajectories` by changing weights and timesteps, in up to `rounds` rounds.

    Each round solves the normal equations, damped as by Levenberg and Marquardt, with differences for derivatives.
    It rounds the new timesteps to integers, and then solves for the weights with these timesteps. It also tries to
    change only the weights, and keeps the best of its results.

    Returns:
        The fit after the round with the smallest error on `check`, or the fit before the first round if no round has a
        smaller error. Its errors are those on `check`.
    """
    now, best = _fit_of(rows, weights, trajectories), _fit_of(rows, weights, check)
    for _ in range(rounds):
        before = now.error
        for trajectory in (*trajectories, *check):
            trajectory.first_terms.clear()  # saves memory: later rounds hardly use the timesteps of earlier rounds
        gram, right = _slopes(now, trajectories)
        for dampings in DAMPINGS:
            candidates = (
                _fit_of(*_after_change(now, gram, right, damping, moves_timesteps=moves_timesteps), trajectories)
                for damping, moves_timesteps in product(dampings, (True, False))
            )
            now = min(now, *candidates, key=lambda finished: finished.error)
            if now.error < before:
                break
        on_check = _fit_of(now.rows, now.weights, check)
        best = min(best, on_check, key=lambda finished: finished.error)
        if not now.error < (1 - GAIN) * before:
            break
    return best


def polish_calls(steps: int, rounds: int, *, guided: bool) -> int:
    """The most model calls that `polish` makes for a batch of `trajectories`. For a batch of `check` it makes fewer."""
    weights = [2 + min(row, HISTORY) + guided for row in range(steps)]
    slopes = 2 * steps - 1 + sum(count * (steps - 1 - row) + steps - row for row, count in enumerate(weights))
    return steps + rounds * (slopes + 2 * sum(map(len, DAMPINGS)) * steps)


def _fit_of(rows: Rows, weights: Weights, trajectories: Sequence[Trajectory]) -> Fit:
    ends = ((trajectory, rows.finish(weights, *rows.begin(trajectory))[1]) for trajectory in trajectories)
    return Fit(rows, weights, torch.cat([distance(samples, trajectory.samples) for trajectory, samples in ends]))


def _after_change(
    now: Fit, gram: Tensor, right: Tensor, damping: float, *, moves_timesteps: bool
) -> tuple[Rows, Weights]:
    """The rows and weights after the change that solves the damped equations `gram @ change = right`.

    moves_timesteps: whether timesteps change, too, or only weights.
    """
    rows, lengths = now.rows, list(map(len, now.weights))
    damped, count = gram + (damping * gram.diagonal() + 1e-12 * gram.diagonal().max()).diag(), sum(lengths)
    if moves_timesteps:
        rows = Rows(rows.diffusion, _new_timesteps(rows, _solved(damped, right)[count:].tolist()))
    shift = gram.new_tensor(rows.timesteps) - gram.new_tensor(now.rows.timesteps)
    change = _solved(damped[:count, :count], right[:count] - damped[:count, count:] @ shift)
    return rows, [weights + part for weights, part in zip(now.weights, change.split(lengths), strict=True)]


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution y of matrix @ y = right, with 0 for numbers that are not finite.

    If the model's outputs are constant or too large, there may be no solution. Then any result will do, since `polish`
    ignores a change that does not reduce the error.
    """
    return torch.linalg.solve_ex(matrix, right)[0].nan_to_num(0, 0, 0)


def _new_timesteps(rows: Rows, change: Sequence[float]) -> list[int]:
    """The rows' timesteps plus `change`, rounded to integers, made strictly descending and kept in the schedule."""
    timesteps = [round(t + max(-1e6, min(shift, 1e6))) for t, shift in zip(rows.timesteps, change, strict=True)]
    for row in reversed(range(len(timesteps))):
        least = timesteps[row + 1] + 1 if row + 1 < len(timesteps) else 0
        timesteps[row] = min(max(timesteps[row], least), rows.diffusion.timesteps - 1 - row)
    return timesteps


def _slopes(now: Fit, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
    """The normal equations for a change of all weights and timesteps: the matrix and the right side.

    The weights of the first row come first, the timesteps last. Each sample counts with the inverse of its error.
    """
    rows, weights = now.rows, now.weights
    count = sum(map(len, weights)) + len(rows)
    gram, right = weights[0].new_zeros(count, count), weights[0].new_zeros(count)
    batches = [len(trajectory.samples) for trajectory in trajectories]
    shifted = list(_shifted_timesteps(rows))
    for trajectory, sample_weights in zip(trajectories, inverse_errors(now.errors).split(batches), strict=True):
        state, terms = rows.begin(trajectory)
        states, samples = rows.finish(weights, state, terms)
        columns = []
        for row, state in enumerate(states):
            terms = rows.terms(row, state) if row else terms
            for number in range(len(weights[row])):
                changed = [row_weights.clone() for row_weights in weights]
                changed[row][number] += STEP
                columns.append((rows.finish(changed, state, terms, row)[1] - samples) / STEP)
        for row, (neighbour, by) in enumerate(shifted):
            state, terms = neighbour.begin(trajectory) if row == 0 else (states[row], neighbour.terms(row, states[row]))
            columns.append((neighbour.finish(weights, state, terms, row)[1] - samples) / by)
        slopes = torch.stack([column.flatten(1).double() for column in columns], -1)
        missing = (trajectory.samples.double() - samples.double()).flatten(1)
        scaled = slopes * sample_weights.to(slopes.device)[:, None, None]
        gram += torch.einsum("bek,bel->kl", scaled, slopes).cpu()
        right += torch.einsum("bek,be->k", scaled, missing).cpu()
    return gram, right


def _shifted_timesteps(rows: Rows) -> Iterator[tuple[Rows, int]]:
    """For each timestep, the rows with only this timestep changed, and the change.

    The timestep is raised by about the share TIMESTEP. If that reaches the timestep before it or the schedule's end, it
    is lowered by 1. If that reaches the timestep after it, the rows stay unchanged, so the derivative is 0.
    """
    after = (*rows.timesteps[1:], -1)
    for row, t in enumerate(rows.timesteps):
        by = 1 + int(TIMESTEP * t)
        by = by if t + by < (rows.timesteps[row - 1] if row else rows.diffusion.timesteps) else -1
        changed = [*rows.timesteps[:row], t + by, *rows.timesteps[row + 1 :]]
        yield (Rows(rows.diffusion, changed), by) if t + by > after[row] else (rows, by)
