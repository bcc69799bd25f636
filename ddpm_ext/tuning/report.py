"""What tuning found, for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddpm_ext.tuning.names import Named

SHOWN = 5


@dataclass(frozen=True)
class Report:
    """How near a tuned table and the named samplers end to the teacher, on samples that nothing was fitted to.

    An error is the root of the mean square of a sample's differences from the teacher's, in the samples' units; `error`
    is its mean over the held-out samples and `median` their median.

    Attributes:
        calls: of the model, in a loop with the table.
        fitted: whether the table is a fitted one; False: that of the best name, which no fit came nearer than.
        error, median: of the table.
        fitted_error: of the fitted table, whether it is the table or not.
        names: the named samplers, the nearest first.
        timesteps: of the table.
        teacher: what it was fitted to, in words. teacher_error: how far half the teacher's steps end from all of them,
            relative to the samples' root mean square.
        seeds: how many samples it was fitted to; held_out: how many the errors are of.
        model_calls: how often the model was called in all.

    Examples:
        >>> from ddpm_ext.tuning import tune
        >>> tuned = tune(gd, model, images.shape, steps=4, seeds=4, progress=False)  # doctest: +SKIP
        >>> tuned.report.calls, len(tuned.report.timesteps)  # doctest: +SKIP
        (4, 4)
    """

    calls: int
    fitted: bool
    error: float
    median: float
    fitted_error: float
    names: Sequence[Named]
    timesteps: Sequence[int | float]
    teacher: str
    teacher_error: float
    seeds: int
    held_out: int
    model_calls: int

    @property
    def best(self) -> Named:
        """The best name."""
        return self.names[0]

    @property
    def notes(self) -> dict[str, Any]:
        """What the table's notes say of it."""
        fitted = f"fitted to {self.seeds} samples of {self.teacher}"
        return {
            "made": fitted if self.fitted else f"{self.best}: no fit is nearer",
            "calls": self.calls,
            "error": round(self.error, 6),
            "best name": f"{self.best}: {self.best.error:.6f}",
        }

    def __str__(self) -> str:
        lines = [
            f"{self.calls} calls, distance to {self.teacher}: mean and median of {self.held_out} held-out samples",
            f"  {'fitted' if self.fitted else 'best name':<44} {self.error:.4f} {self.median:.4f}",
        ]
        if not self.fitted:
            lines.append(f"  {'no fit is nearer; the nearest':<44} {self.fitted_error:.4f}")
        lines += [f"  {each!s:<44} {each.error:.4f} {each.median:.4f}" for each in self.names[:SHOWN]]
        return "\n".join(
            [
                *lines,
                f"timesteps: {', '.join(f'{t:g}' for t in self.timesteps)}",
                f"teacher's own error: {self.teacher_error:.2%} of the samples' size; fitted to {self.seeds} samples, "
                f"by {self.model_calls} calls of the model",
            ]
        )


def as_near_as(reports: Sequence[Report]) -> list[str]:
    """For each table, in how many calls a name is as near, one sentence each: of the names in any of the reports."""
    sentences = []
    names = sorted((report.best for report in reports), key=lambda each: each.calls)
    for report in reports:
        near = next((each for each in names if each.error <= report.error), None)
        if near is None:
            sentences.append(f"{report.calls} calls are nearer than any name in up to {names[-1].calls}")
        else:
            sentences.append(f"{report.calls} calls are as near as {near} in {near.calls}")
    return sentences
