"""What a step table's notes say of the loop that it was made for, and a warning where another loop takes it."""

from __future__ import annotations

import warnings
from typing import Any

from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.process.process import Process
from ddpm_ext.tables.step_table import StepTable


def notes_of_loop(process: Process, options: LoopOptions) -> dict[str, Any]:
    """The notes of a table that is made for a loop with these options: what its numbers would not show."""
    clip = options.clip if options.threshold is None else str(options.threshold)
    return {
        "prediction": process.prediction,
        "guidance": _scale(options.guide),
        "clip": list(clip) if isinstance(clip, tuple) else clip,
    }


def _scale(guidance: Guidance | None) -> float | str | None:
    """The scale alone where there is nothing more."""
    if guidance is None or guidance == Guidance(guidance.scale, guidance.unconditional):
        return None if guidance is None or guidance.scale == 1 else float(guidance.scale)
    return f"{guidance.scale:g}, rescale {guidance.rescale:g}, interval {guidance.interval}"


def check_notes(process: Process, options: LoopOptions) -> None:
    """Warns where the loop takes a table that was made for another guidance, clip or prediction."""
    if not isinstance(options.sampler, StepTable) or not options.sampler.notes:
        return
    notes = options.sampler.notes
    for name, found in notes_of_loop(process, options).items():
        if name in notes and notes[name] != found:
            warnings.warn(
                f"the table was made for {name} {notes[name]!r}, and the loop has {found!r}: named samplers may come "
                "nearer than it does",
                stacklevel=2,
            )
