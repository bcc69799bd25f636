"""`ddpm-ext compare`: compares loops of few model calls to a loop of many steps.

The loops have all samplers and spacings, with an eta of 0. Samplers that still add noise, and CFG++'s, are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ddpm_ext import plots
from ddpm_ext.base.optional import has_bars, require
from ddpm_ext.cli.arguments import (
    FIGURES,
    Subparsers,
    add_command,
    check_out,
    endings_help,
    finite_number,
    samples,
    whole_numbers,
)
from ddpm_ext.cli.loop_inputs import add_clip, clip_of, running_of
from ddpm_ext.cli.sampling import Loaded, load
from ddpm_ext.cli.sampling_options import add_class, add_model, add_null_class, add_running, add_seed
from ddpm_ext.ops.noise import Philox
from ddpm_ext.plots.tuning import errors_by_name
from ddpm_ext.tuning import Named, Tuner
from ddpm_ext.tuning.report import WHOLE_TIMESTEPS
from ddpm_ext.tuning.teacher import STEPS

_SHOWN = 10  # how many samplers have a line of their own
_EXAMPLES = """examples:
  ddpm-ext compare --calls 4,6,8,10
  ddpm-ext compare --model shapes --guidance 2.5 --calls 6,10,20 --plot compare.png"""


def add_parser(commands: Subparsers) -> None:
    description = "Shows how far each sampler with each spacing ends from the samples of a loop of many steps."
    parser = add_command(commands, "compare", description, epilog=_EXAMPLES)
    add_options(parser, "calls", "numbers of calls of the model", seeds="samples that are compared")


def add_options(parser: argparse.ArgumentParser, counts: str, counts_help: str, *, seeds: str) -> Any:
    """Adds the options that `compare` and `tune` share, and returns the group of output options.

    Args:
        counts, counts_help: the name and the help text of the option for the numbers of calls.
        seeds: the help text of --seeds.
    """
    group = parser.add_argument_group("what to sample")
    add_model(group)
    add = group.add_argument
    counts_text = f"{counts_help}, with commas between them"
    add(f"--{counts}", type=whole_numbers, default="4,6,8,10", metavar="N,...", help=counts_text)
    scale = "scale of classifier-free guidance: 1 for none, and further towards the class above 1"
    add("--guidance", type=finite_number, metavar="X", help=scale)
    add_class(group, "all")
    add_null_class(group)
    add("--seeds", type=samples, default=64, metavar="N", help=seeds)
    add_seed(group)
    add_clip(group)
    add_running(parser, batches="samples at a time", capture=False, dtype=False)
    plot = f"draws the errors against the calls; {endings_help()}"
    output = parser.add_argument_group("output")
    output.add_argument("--plot", metavar="FILE", help=plot)
    return output


def prepare(options: argparse.Namespace, counts: str) -> tuple[Loaded, Tuner, list[int]]:
    """Loads the model and checks the options that `compare` and `tune` share. counts: see add_options.

    Returns:
        The model, its Tuner, and the numbers of calls in ascending order.
    """
    if options.plot is not None:
        check_out(options.plot, FIGURES, "plot")
        require("matplotlib.figure", "drawing errors")
    loaded = load(options, latents=True)
    numbers, most = sorted({*getattr(options, counts)}), loaded.diffusion.timesteps
    if most < STEPS:
        raise ValueError(f"model: {options.model} has {most} timesteps, expected at least {STEPS}, to compare with")
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= most:
        got = ",".join(map(str, numbers)) or "none"
        raise ValueError(f"{counts}: got {got}, expected numbers from 1 to {most}, the model's timesteps")
    batch = min(options.batch_size, -(-options.seeds // 2))
    guided = options.guidance is not None
    tuner = Tuner(
        loaded.diffusion,
        loaded.model.unet,
        (batch, *loaded.model.shape),
        guidance=options.guidance,
        clip_denoised=clip_of(options),
        model_kwargs=loaded.model_kwargs(range(batch), guided=guided),
        autocast=running_of(options)["autocast"],
        seeds=options.seeds,
        rng=Philox(options.seed),
        progress=not options.quiet and has_bars(),
    )
    return loaded, tuner, numbers


def run(options: argparse.Namespace) -> None:
    """Prints the errors, and draws them if the options ask for it."""
    _, tuner, counts = prepare(options, "calls")
    print(f"at most {tuner.planned_calls(counts, fit=False):,} calls of the model", flush=True)
    names = {count: tuner.compare(count) for count in counts}
    print(
        f"{tuner.calls:,} calls of the model; the many steps' own error is {tuner.teacher_error:.2%} of a sample's size"
    )
    if tuner.whole_timesteps:
        print(WHOLE_TIMESTEPS)
    print("\n".join([*_lines(names), *(f"{count} calls: {typed(named[0])}" for count, named in names.items())]))
    if options.plot is not None:
        plots.names_figure(names, options.plot)
        print(options.plot)


def typed(named: Named) -> str:
    """The options of `ddpm-ext sample` for a loop with this sampler, as one types them."""
    return " ".join(f"--{name} {value}" for name, value in named.options.items())


def _lines(names: Mapping[int, Sequence[Named]]) -> list[str]:
    """The lines of the printed table: the errors of each of the best samplers, then the range of all other errors."""
    errors_of = errors_by_name(names)
    smallest = {count: min(errors[count] for errors in errors_of.values() if count in errors) for count in names}
    others = list(errors_of.values())[_SHOWN:]
    width = max(map(len, list(errors_of)[:_SHOWN])) + 2
    lines = [f"{'error in calls:':<{width}}" + "".join(f"{count:>16} " for count in names)]
    for name, errors in list(errors_of.items())[:_SHOWN]:
        cells = [f"{errors[c]:.4f}" if c in errors else "-" for c in names]
        marks = ["*" if errors.get(c) == smallest[c] else " " for c in names]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>16}{mark}" for cell, mark in zip(cells, marks, strict=True)))
    if others:
        ranges = []
        for count in names:
            values = [errors[count] for errors in others if count in errors]
            ranges.append(f"{min(values):.4f} to {max(values):.3g}" if values else "-")
        lines.append(f"{f'{len(others)} others':<{width}}" + "".join(f"{span:>16} " for span in ranges))
    return [*lines, "* the best"]
