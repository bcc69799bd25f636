"""The notes of a step table, which say for which prediction, guidance and clip it was made, and their checks.

A loop warns if its own prediction, guidance or clip differs from the notes, or its schedule from the table's levels.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.process.process import Process
from ddpm_ext.tables.step_table import StepTable

# Measured on the model "shapes" with 6 calls: docs/developers/measurements.md.
_GUIDANCE_ERRORS = (
    " (with half or twice its scale the error was up to 1.3 times that of a table for it, with 3.5 times 1.6)"
)
# check_schedule warns if the levels of a row and of the schedule differ by more than this: in the angle
# atan2(noise, signal), in radians, or in the logarithm of the size sqrt(signal^2 + noise^2).
NEAR = 0.01


def notes_of_loop(process: Process, options: LoopOptions) -> dict[str, Any]:
    """The notes of a table for a loop with these options: prediction, guidance and clip, which no column shows."""
    clip = options.clip if options.threshold is None else str(options.threshold)
    return {
        "prediction": process.prediction,
        "guidance": _guidance_note(options.guide),
        "clip": list(clip) if isinstance(clip, tuple) else clip,
    }


def _guidance_note(guidance: Guidance | None) -> float | str | None:
    """The note about guidance: its scale, or a string with `rescale` and `interval` too if one of them is set.

    It is None without guidance, and for a scale of 1 with neither, which is no guidance.
    """
    if guidance is None or guidance == Guidance(guidance.scale, guidance.unconditional):
        return None if guidance is None or guidance.scale == 1 else float(guidance.scale)
    return f"{guidance.scale:g}, rescale {guidance.rescale:g}, interval {guidance.interval}"


def check_notes(process: Process, options: LoopOptions) -> None:
    """Warns if the loop's guidance, clip or prediction is not the one that the table was made for."""
    if not isinstance(options.sampler, StepTable) or not options.sampler.notes:
        return
    for name, value in notes_of_loop(process, options).items():
        check_note(options.sampler, name, value, "the loop has")


def check_note(table: StepTable, name: str, loop_value: Any, has: str) -> None:
    """Warns if the table's note `name` differs from the loop's value.

    Args:
        name: the name of a note, such as "prediction".
        loop_value: the value of the same name in the loop.
        has: the subject and verb of the warning, such as "the loop has".
    """
    made_for = table.notes.get(name, loop_value)
    if made_for != loop_value:
        warnings.warn(
            f"the table was made for {name} {made_for!r}, and {has} {loop_value!r}: named samplers may come "
            f"nearer than it does{_GUIDANCE_ERRORS if name == 'guidance' and made_for and loop_value else ''}",
            stacklevel=3,
        )


def check_schedule(process: Process, table: StepTable) -> None:
    """Warns if the level of a row differs from the schedule's level at the row's timestep. Names the first such row.

    For fractional timesteps, and for a schedule that has other timesteps for the model, only the level's size
    sqrt(signal^2 + noise^2) is compared. Raises ValueError if a row's timestep is outside the schedule, unless the
    schedule has other timesteps for the model.
    """
    signal, noise, t = table.signal_now, table.noise_now, table.timestep
    power = torch.hypot(signal, noise)
    # A row without noise is not compared. If it starts at clean data, as those of dpmpp_2m_cfg_pp, it has the previous
    # row's timestep. If its signal is 0 as well, its level is unknown.
    has_noise = noise > 0
    # The size is compared in all cases. It differs between flows, sigma space and variance-preserving processes.
    scale = process.schedule.scale
    expected = torch.ones_like(power) if scale is None else scale(signal / power, noise / power)
    differs = has_noise & ~((power / expected).log().abs() < NEAR)
    # If the schedule has timesteps of its own for the model, the rows have those, which may be any numbers.
    if process.schedule.timestep is None:
        outside = (t < 0) | (t > process.timesteps - 1)
        for row in outside.nonzero().flatten().tolist():
            timestep = f"{t[row].item():g}" if t.is_floating_point() else int(t[row])
            raise ValueError(f"the table's row {row} has timestep {timestep}, expected 0 to {process.timesteps - 1}")
        if not t.is_floating_point():
            angle = torch.atan2(process.schedule.noise[t], process.schedule.signal[t])
            differs |= has_noise & ((torch.atan2(noise, signal) - angle).abs() > NEAR)
    for row in differs.nonzero().flatten().tolist()[:1]:
        warnings.warn(
            f"the table's row {row}, at timestep {t[row].item():g}, is for samples {signal[row]:.3g} x0 + "
            f"{noise[row]:.3g} eps, which this diffusion does not have there: the table was made for another schedule",
            stacklevel=2,
        )
