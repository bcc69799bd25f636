"""What a step table's notes and levels say of the loop that it was made for, and warnings where another takes it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.process.process import Process
from ddpm_ext.tables.step_table import StepTable

# Measured on the model "shapes" with 6 calls: docs/developers/measurements.md.
_OF_GUIDANCE = (
    " (with half or twice its scale the error was up to 1.3 times that of a table for it, with 3.5 times 1.6)"
)
NEAR = 0.01  # radians between signal and noise, and a relative difference of their sizes, that are no other level


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
    for name, found in notes_of_loop(process, options).items():
        check_note(options.sampler, name, found, "the loop has")


def check_note(table: StepTable, name: str, found: Any, has: str) -> None:
    """Warns where the table's notes have something else by this name. has: who has `found`, with the verb."""
    made_for = table.notes.get(name, found)
    if made_for != found:
        warnings.warn(
            f"the table was made for {name} {made_for!r}, and {has} {found!r}: named samplers may come "
            f"nearer than it does{_OF_GUIDANCE if name == 'guidance' and made_for and found else ''}",
            stacklevel=3,
        )


def check_schedule(process: Process, table: StepTable) -> None:
    """Warns where a row's samples are at another level than the schedule's at its timestep, and names the first one.

    Raises ValueError where the schedule has no such timestep.
    """
    signal, noise, t = table.signal_now, table.noise_now, table.timestep
    power = torch.hypot(signal, noise)
    known = noise > 0  # a row that starts at clean data has the timestep of the row before it
    # By this scale samples of flows, of sigma space and variance-preserving ones differ at any timestep.
    scale = process.schedule.scale
    expected = torch.ones_like(power) if scale is None else scale(signal / power, noise / power)
    differs = known & ~((power / expected).log().abs() < NEAR)
    if process.schedule.timestep is None:  # else a row has what the model is called with, which may be any number
        outside = (t < 0) | (t > process.timesteps - 1)
        for row in outside.nonzero().flatten().tolist():
            found = f"{t[row].item():g}" if t.is_floating_point() else int(t[row])
            raise ValueError(f"the table's row {row} has timestep {found}, expected 0 to {process.timesteps - 1}")
        if not t.is_floating_point():
            own = torch.atan2(process.schedule.noise[t], process.schedule.signal[t])
            differs |= known & ((torch.atan2(noise, signal) - own).abs() > NEAR)
    for row in differs.nonzero().flatten().tolist()[:1]:
        warnings.warn(
            f"the table's row {row}, at timestep {t[row].item():g}, is for samples {signal[row]:.3g} x0 + "
            f"{noise[row]:.3g} eps, which this diffusion does not have there: the table was made for another schedule",
            stacklevel=2,
        )
