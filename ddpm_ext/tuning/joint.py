"""All weights of a table and its timesteps together, by the method of Gauss and Newton.

What is fitted is where the last samples end; each row's fit by itself, which came before, knew the next timestep alone.
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

STEP = 1e-3  # by which a weight is changed to see what follows
TIMESTEP = 0.01  # the same for a timestep, as a share of itself
DAMPINGS = ((1e-2, 1e-3), (1.0, 1e-1))  # the second ones where no step with the first ones comes nearer
ROUNDS, GAIN = 6, 0.005  # at most so many rounds, while each gains so much


class Fit(NamedTuple):
    """Rows with their weights, and the errors that a loop with them ends with."""

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
    """Descends from these weights and timesteps on the samples of `trajectories`; returns the round that ends nearest
    for `checked`, with its errors there.

    Steps are damped as by Levenberg and Marquardt, with differences in place of derivatives. Timesteps are rounded, and
    the weights are solved for again beside the rounded ones.
    """
    now, best = _finished(rows, weights, trajectories), _finished(rows, weights, checked)
    for _ in range(rounds):
        before = now.error
        for each in (*trajectories, *checked):
            each.first_terms.clear()  # of rows that were left behind
        gram, right = _slopes(now, trajectories)
        for dampings in DAMPINGS:
            candidates = (
                _finished(*_moved(now, gram, right, damping, moves=moves), trajectories)
                for damping, moves in product(dampings, (True, False))
            )
            now = min(now, *candidates, key=lambda each: each.error)
            if now.error < before:
                break
        found = _finished(now.rows, now.weights, checked)
        best = min(best, found, key=lambda each: each.error)
        if not now.error < (1 - GAIN) * before:
            break
    return best


def polish_calls(steps: int, rounds: int, *, guided: bool) -> int:
    """How often `polish` calls the model at most, for a batch that is fitted to, and as often for one that is not."""
    weights = [2 + min(row, HISTORY) + guided for row in range(steps)]
    slopes = steps + sum(count * (steps - 1 - row) + steps - row for row, count in enumerate(weights))
    return steps + rounds * (slopes + 2 * sum(map(len, DAMPINGS)) * steps)


def _finished(rows: Rows, weights: Weights, trajectories: Sequence[Trajectory]) -> Fit:
    ends = ((own, rows.finish(weights, *rows.begin(own))[1]) for own in trajectories)
    return Fit(rows, weights, torch.cat([distance(samples, own.samples) for own, samples in ends]))


def _moved(now: Fit, gram: Tensor, right: Tensor, damping: float, *, moves: bool) -> tuple[Rows, Weights]:
    """Rows and weights after the change that solves these equations. moves: whether timesteps change."""
    rows, lengths = now.rows, list(map(len, now.weights))
    damped, own = gram + (damping * gram.diagonal() + 1e-12 * gram.diagonal().max()).diag(), sum(lengths)
    if moves:
        rows = Rows(rows.diffusion, _in_order(rows, _solved(damped, right)[own:].tolist()))
    shift = gram.new_tensor(rows.timesteps) - gram.new_tensor(now.rows.timesteps)
    change = _solved(damped[:own, :own], right[:own] - damped[:own, own:] @ shift)
    return rows, [weights + part for weights, part in zip(now.weights, change.split(lengths), strict=True)]


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """The solution, finite. Where outputs say nothing, or are too large for any sum, there is none, and any will do:
    what does not come nearer is not taken."""
    return torch.linalg.solve_ex(matrix, right)[0].nan_to_num(0, 0, 0)


def _in_order(rows: Rows, change: Sequence[float]) -> list[int]:
    """The timesteps after this change, rounded, each below the one before."""
    found = [round(t + max(-1e6, min(own, 1e6))) for t, own in zip(rows.timesteps, change, strict=True)]
    for row in reversed(range(len(found))):
        least = found[row + 1] + 1 if row + 1 < len(found) else 0
        found[row] = min(max(found[row], least), rows.diffusion.timesteps - 1 - row)
    return found


def _slopes(now: Fit, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
    """The normal equations for a change of all weights, then of the timesteps, each sample weighted by the inverse of
    its error."""
    rows, weights = now.rows, now.weights
    count = sum(map(len, weights)) + len(rows)
    gram, right = weights[0].new_zeros(count, count), weights[0].new_zeros(count)
    batches = [len(own.samples) for own in trajectories]
    beside = list(_beside(rows))
    for trajectory, of_sample in zip(trajectories, inverse_errors(now.errors).split(batches), strict=True):
        place, terms = rows.begin(trajectory)
        places, samples = rows.finish(weights, place, terms)
        columns = []
        for row, place in enumerate(places):
            terms = rows.terms(row, place) if row else terms
            for number in range(len(weights[row])):
                changed = [own.clone() for own in weights]
                changed[row][number] += STEP
                columns.append((rows.finish(changed, place, terms, row)[1] - samples) / STEP)
        for row, (other, by) in enumerate(beside):
            place, terms = other.begin(trajectory) if row == 0 else (places[row], other.terms(row, places[row]))
            columns.append((other.finish(weights, place, terms, row)[1] - samples) / by)
        slopes = torch.stack([column.flatten(1).double() for column in columns], -1)
        missing = (trajectory.samples.double() - samples.double()).flatten(1)
        scaled = slopes * of_sample.to(slopes.device)[:, None, None]
        gram += torch.einsum("bek,bel->kl", scaled, slopes).cpu()
        right += torch.einsum("bek,be->k", scaled, missing).cpu()
    return gram, right


def _beside(rows: Rows) -> Iterator[tuple[Rows, int]]:
    """Rows with one timestep changed, each in turn, and by how much; where there is no room, it stays, a slope of 0."""
    after = (*rows.timesteps[1:], -1)
    for row, t in enumerate(rows.timesteps):
        by = 1 + int(TIMESTEP * t)
        by = by if t + by < (rows.timesteps[row - 1] if row else rows.diffusion.timesteps) else -1
        at = [*rows.timesteps[:row], t + by, *rows.timesteps[row + 1 :]]
        yield (Rows(rows.diffusion, at), by) if t + by > after[row] else (rows, by)
