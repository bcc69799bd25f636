"""The result of tuning, for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddpm_ext.tuning.errors import Errors
from ddpm_ext.tuning.names import Named

SHOWN = 5  # how many named samplers the printed report lists
WHOLE_TIMESTEPS = "names with timesteps between the schedule's are left out: the model fails there"


@dataclass(frozen=True, kw_only=True)
class Report(Errors):
    """The errors of a tuned table and of the named samplers, on samples that nothing was fitted to.

    A named sampler is a sampler with a spacing. str(report), `notes` and `pays` call it a name.

    Attributes:
        error, standard_error, mean, median: the errors of the table (see Errors).
        calls: the number of model calls in a loop with the table.
        fitted: whether the table is the fitted one. If False, it is that of the best named sampler, since the fitted
            table's error was not smaller.
        fitted_error: the error of the fitted table, also if `fitted` is False.
        names: the named samplers, the nearest to the teacher first. From the 13th on, a Tuner measures their errors on
            fewer samples: see Tuner.compare.
        as_near: a named sampler that needs more calls than the table for an error that is at most the table's, or None.
            If `fitted`, loops with up to `looked` times as many calls were tried. `looked` is 0 for a pipeline of
            diffusers, for which none is tried.
        bfloat16_error: the table's error in a loop with samples in bfloat16, or None if it was not measured.
        timesteps: the timesteps of the table.
        teacher: a description of the teacher, the loop of many steps from whose samples distances are measured.
        teacher_error: the distance between the teacher's samples with half its steps and with all its steps, relative
            to the samples' root mean square.
        seeds: the number of samples that the fitted table was fitted to.
        held_out: the number of samples that the table's errors are measured on.
        model_calls: the number of model calls that tuning made, including the teacher's, which a Tuner makes once for
            all its tables.
        names_calls: the number of these calls that the comparison of the named samplers made.
        batch: the number of samples in each call.
        whole_timesteps: whether named samplers with timesteps that are not integers are left out, since the model
            fails at such timesteps.

    Examples:
        >>> from ddpm_ext.tuning import tune
        >>> tuned = tune(gd, model, images.shape, steps=4, seeds=4, progress=False)  # doctest: +SKIP
        >>> tuned.report.calls, len(tuned.report.timesteps)  # doctest: +SKIP
        (4, 4)
    """

    calls: int
    fitted: bool
    fitted_error: float
    names: Sequence[Named]
    as_near: Named | None = None
    looked: float = 0.0
    bfloat16_error: float | None = None
    timesteps: Sequence[int | float]
    teacher: str
    teacher_error: float
    seeds: int
    held_out: int
    model_calls: int
    names_calls: int
    batch: int
    whole_timesteps: bool = False

    @property
    def best(self) -> Named:
        """The named sampler with the smallest error."""
        return self.names[0]

    @property
    def notes(self) -> dict[str, Any]:
        """What the notes of the table (StepTable.notes) say about tuning."""
        fitted = f"fitted to {self.seeds} samples of {self.teacher}"
        return {
            "made": fitted if self.fitted else f"{self.best}: no fit is nearer",
            "calls": self.calls,
            "error": round(self.error, 6),
            "error of": f"{self.held_out} samples, the nearest 90 %",
            "best name": f"{self.best}: {self.best.error:.6f}",
            **({"eta": self.best.eta} if not self.fitted and self.best.eta is not None else {}),
        }

    @property
    def pays(self) -> str:
        """A sentence: what tuning cost and, if `as_near` is not None, after how many images it has paid off."""
        share = self.names_calls / max(self.model_calls, 1)
        cost = f"{self.model_calls:,} calls of the model for {self.batch} samples each, {share:.0%} for the names"
        if not self.fitted:
            return f"{cost}; the table is a name's"
        if self.as_near is None:
            return f"{cost}; no name was as near in up to {self.looked:g} times as many" if self.looked else cost
        images = float(f"{self.model_calls * self.batch / (self.as_near.calls - self.calls):.2g}")
        return f"{cost}; pays after {images:,.0f} images that take {self.calls} calls in place of {self.as_near.calls}"

    def __str__(self) -> str:
        lines = [
            f"{self.calls} calls, distance to {self.teacher}: of {self.held_out} held-out samples the mean of the "
            "nearest 90 %, its standard error; mean and median of all",
            _line("fitted" if self.fitted else "best name", self),
        ]
        if not self.fitted:
            lines.append(f"  {'no fit is nearer; the nearest':<52} {self.fitted_error:.4f}")
        lines += [_line(str(named), named) for named in self.names[:SHOWN]]
        if self.looked:  # 0 for a pipeline: p_sample_loop may not take the best name's scheduler or spacing
            typed = ", ".join(f"{name}={value!r}" for name, value in self.best.options.items())
            lines.append(f"the best name's loop: {typed}")
        if self.fitted and self.as_near is not None:
            lines.append(f"as near as {self.as_near} in {self.as_near.calls} calls")
        if self.whole_timesteps:
            lines.append(WHOLE_TIMESTEPS)
        if self.bfloat16_error is not None:
            lines.append(f"with samples in bfloat16: {self.bfloat16_error:.4f}")
        return "\n".join(
            [
                *lines,
                f"timesteps: {', '.join(f'{t:g}' for t in self.timesteps)}",
                f"teacher's own error: {self.teacher_error:.2%} of the samples' size; fitted to {self.seeds} samples",
                self.pays,
            ]
        )


def _line(name: str, errors: Errors) -> str:
    return f"  {name:<52} {errors.error:.4f} ± {errors.standard_error:.4f}  {errors.mean:.4f}  {errors.median:.4f}"
