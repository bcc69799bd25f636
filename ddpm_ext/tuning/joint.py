"""Fits all weights and timesteps of a table together, by the method of Gauss and Newton.

This minimizes the error of the final samples. The fit of single rows, which comes first, only minimizes the error at
the next timestep.
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

STEP = 1e-3  # the change of a weight from which its slope is computed
TIMESTEP = 0.01  # the same for a timestep, as a share of the timestep
DAMPINGS = ((1e-2, 1e-3), (1.0, 1e-1))  # the second pair is tried if no step with the first pair reduces the error
ROUNDS, GAIN = 6, 0.005  # at most ROUNDS rounds, as long as each reduces the error by the share GAIN


class Fit(NamedTuple):
    """Rows with their weights, and the errors of a loop's final samples."""

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
    checked: Sequence[Trajectory],
    rounds: int = ROUNDS,
) -> Fit:
    """Reduces the error on `trajectories`, starting from these weights and timesteps.

    Returns the round with the smallest error on `checked`, with its errors on `checked`. Steps are damped as by
    Levenberg and Marquardt, with differences in place of derivatives. Timesteps are rounded, and the weights are then
    solved for again with the rounded timesteps.
    """
    now, best = _finished(rows, weights, trajectories), _finished(rows, weights, checked)
    for _ in range(rounds):
        before = now.error
        for trajectory in (*trajectories, *checked):
            trajectory.first_terms.clear()  # the cached terms belong to timesteps of earlier rounds
        gram, right = _slopes(now, trajectories)
        for dampings in DAMPINGS:
            candidates = (
                _finished(*_moved(now, gram, right, damping, moves=moves), trajectories)
                for damping, moves in product(dampings, (True, False))
            )
            now = min(now, *candidates, key=lambda finished: finished.error)
            if now.error < before:
                break
        on_checked = _finished(now.rows, now.weights, checked)
        best = min(best, on_checked, key=lambda finished: finished.error)
        if not now.error < (1 - GAIN) * before:
            break
    return best


def polish_calls(steps: int, rounds: int, *, guided: bool) -> int:
    """The most calls of the model in `polish` for a batch of `trajectories`; a batch of `checked` takes fewer."""
    weights = [2 + min(row, HISTORY) + guided for row in range(steps)]
    slopes = steps + sum(count * (steps - 1 - row) + steps - row for row, count in enumerate(weights))
    return steps + rounds * (slopes + 2 * sum(map(len, DAMPINGS)) * steps)


def _finished(rows: Rows, weights: Weights, trajectories: Sequence[Trajectory]) -> Fit:
    ends = ((trajectory, rows.finish(weights, *rows.begin(trajectory))[1]) for trajectory in trajectories)
    return Fit(rows, weights, torch.cat([distance(samples, trajectory.samples) for trajectory, samples in ends]))


def _moved(now: Fit, gram: Tensor, right: Tensor, damping: float, *, moves: bool) -> tuple[Rows, Weights]:
    """Rows and weights after the change that solves the damped equations. moves: whether timesteps change."""
    rows, lengths = now.rows, list(map(len, now.weights))
    damped, count = gram + (damping * gram.diagonal() + 1e-12 * gram.diagonal().max()).diag(), sum(lengths)
    if moves:
        rows = Rows(rows.diffusion, _in_order(rows, _solved(damped, right)[count:].tolist()))
    shift = gram.new_tensor(rows.timesteps) - gram.new_tensor(now.rows.timesteps)
    change = _solved(damped[:count, :count], right[:count] - damped[:count, count:] @ shift)
    return rows, [weights + part for weights, part in zip(now.weights, change.split(lengths), strict=True)]


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution of the equations, with 0 for numbers that are not finite.

    If outputs are constant or too large, there may be no solution. Any result will do: the caller only takes a step
    that reduces the error.
    """
    return torch.linalg.solve_ex(matrix, right)[0].nan_to_num(0, 0, 0)


def _in_order(rows: Rows, change: Sequence[float]) -> list[int]:
    """The timesteps after this change, rounded and made strictly descending."""
    timesteps = [round(t + max(-1e6, min(shift, 1e6))) for t, shift in zip(rows.timesteps, change, strict=True)]
    for row in reversed(range(len(timesteps))):
        least = timesteps[row + 1] + 1 if row + 1 < len(timesteps) else 0
        timesteps[row] = min(max(timesteps[row], least), rows.diffusion.timesteps - 1 - row)
    return timesteps


def _slopes(now: Fit, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
    """The normal equations for a change of all weights, then of the timesteps, each sample weighted by the inverse of
    its error."""
    rows, weights = now.rows, now.weights
    count = sum(map(len, weights)) + len(rows)
    gram, right = weights[0].new_zeros(count, count), weights[0].new_zeros(count)
    batches = [len(trajectory.samples) for trajectory in trajectories]
    neighbours = list(_beside(rows))
    for trajectory, of_sample in zip(trajectories, inverse_errors(now.errors).split(batches), strict=True):
        state, terms = rows.begin(trajectory)
        states, samples = rows.finish(weights, state, terms)
        columns = []
        for row, state in enumerate(states):
            terms = rows.terms(row, state) if row else terms
            for number in range(len(weights[row])):
                changed = [of_row.clone() for of_row in weights]
                changed[row][number] += STEP
                columns.append((rows.finish(changed, state, terms, row)[1] - samples) / STEP)
        for row, (neighbour, by) in enumerate(neighbours):
            state, terms = neighbour.begin(trajectory) if row == 0 else (states[row], neighbour.terms(row, states[row]))
            columns.append((neighbour.finish(weights, state, terms, row)[1] - samples) / by)
        slopes = torch.stack([column.flatten(1).double() for column in columns], -1)
        missing = (trajectory.samples.double() - samples.double()).flatten(1)
        scaled = slopes * of_sample.to(slopes.device)[:, None, None]
        gram += torch.einsum("bek,bel->kl", scaled, slopes).cpu()
        right += torch.einsum("bek,be->k", scaled, missing).cpu()
    return gram, right


def _beside(rows: Rows) -> Iterator[tuple[Rows, int]]:
    """For each timestep: the rows with this timestep changed, and the change.

    If there is no room between the neighbouring timesteps, the rows stay unchanged, which gives a slope of 0.
    """
    after = (*rows.timesteps[1:], -1)
    for row, t in enumerate(rows.timesteps):
        by = 1 + int(TIMESTEP * t)
        by = by if t + by < (rows.timesteps[row - 1] if row else rows.diffusion.timesteps) else -1
        changed = [*rows.timesteps[:row], t + by, *rows.timesteps[row + 1 :]]
        yield (Rows(rows.diffusion, changed), by) if t + by > after[row] else (rows, by)
