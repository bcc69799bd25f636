"""`ddpm-ext tune`: fits step tables to a model, so that a loop needs only a few calls of the model."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.cli import compare
from ddpm_ext.cli.arguments import Subparsers, add_command
from ddpm_ext.cli.chosen_tables import tune_command
from ddpm_ext.cli.network import model_hash
from ddpm_ext.models import tuned
from ddpm_ext.tuning import Report
from ddpm_ext.tuning.report import WHOLE_TIMESTEPS

EXAMPLE_SCALE = 2.0  # a usual scale of guidance, for the command that is suggested
# To estimate how long tuning takes, TIMED_CALLS calls of the model are timed, after the slow first FIRST_CALLS calls.
FIRST_CALLS, TIMED_CALLS = 3, 10
LEAST_SHARE = 0.5  # in tests, tuning took at least this share of the planned calls, which are an upper bound
_EXAMPLES = """examples:
  ddpm-ext tune --model my-run --steps 4,6,8,10
  ddpm-ext sample --model my-run --sampler tuned --steps 6 --out samples.png
  ddpm-ext tune --model shapes --guidance 2.5 --steps 6 --out tables --plot tune.png
  ddpm-ext sample --model shapes --guidance 2.5 --table tables/6-guidance-2.5.json --out shapes.png"""


def add_parser(commands: Subparsers) -> None:
    description = "Fits step tables to a model: a few steps end near where many would. Only forward calls are needed."
    parser = add_command(commands, "tune", description, epilog=_EXAMPLES)
    counts = "steps of the tables, in each of which the model is called once"
    output = compare.add_options(parser, "steps", counts, seeds="samples to fit to; as many again are held out")
    folder = f"folder for the tables, N.json or with guidance N-guidance-X.json (default: {tuned.FOLDER}/ of the model)"
    output.add_argument("--out", metavar="FOLDER", help=folder)


def run(options: argparse.Namespace) -> None:
    """Writes the tables, and prints their errors."""
    loaded, tuner, counts = compare.prepare(options, "steps")
    folder = loaded.model.folder / tuned.FOLDER if options.out is None else Path(options.out)
    paths = {count: folder / tuned.table_name(count, options.guidance) for count in counts}
    for path in paths.values():
        files.check_writable(path)
    sha256 = model_hash(loaded.model)
    chosen = {} if options.classes is None else {"classes": options.classes}
    if loaded.classes is not None and options.guidance is None:
        guided = tune_command(options, ",".join(map(str, counts)), EXAMPLE_SCALE)
        print(f"tuning without guidance; for loops with --guidance, which {options.model} can have, type: {guided}")
    most = tuner.planned_calls(counts)
    print(f"at most {most:,} calls of the model", flush=True)
    _tell_time(loaded.model.unet, most)
    reports = []
    for count, path in paths.items():
        result = tuner.tune(count)
        table = replace(result.table, notes=result.table.notes | chosen)
        tuned.save_tuned(table, path, model_sha256=sha256, seed=options.seed)
        print(path, flush=True)
        reports.append(result.report)
    print(
        f"{tuner.calls:,} calls of the model; the many steps' own error is {tuner.teacher_error:.2%} of a sample's size"
    )
    if tuner.whole_timesteps:
        print(WHOLE_TIMESTEPS)
    print("\n".join(_lines(reports)))
    if options.plot is not None:
        plots.tuning_figure(reports, options.plot)
        print(options.plot)


def _tell_time(model: torch.nn.Module, most: int) -> None:
    """Makes the model print, after its first calls, about how long tuning with up to `most` calls will take."""
    call_times: list[float] = []

    def record_call(*_: object) -> None:
        call_times.append(time.monotonic())
        if len(call_times) > FIRST_CALLS + TIMED_CALLS:
            handle.remove()
            durations = [after - before for before, after in pairwise(call_times[FIRST_CALLS:])]
            seconds = most * statistics.median(durations)
            unit, size = ("minutes", 60) if seconds >= 100 else ("seconds", 1)
            print(
                f"about {max(LEAST_SHARE * seconds / size, 1):.0f} to {max(seconds / size, 1):.0f} {unit}", flush=True
            )

    handle = model.register_forward_pre_hook(record_call)


def _lines(reports: Sequence[Report]) -> list[str]:
    lines = ["calls   tuned table   best name"]
    for report in reports:
        remark = "" if report.fitted else f"; no fit is nearer ({report.fitted_error:.4f}), so the table is this name's"
        lines.append(f"{report.calls:>5}  {report.error:>12.4f}  {report.best.error:>10.4f}  {report.best}{remark}")
    for report in reports:
        lines.append(f"the best name for {report.calls} calls: {compare.typed(report.best)}")
        if report.fitted:
            near = report.as_near
            as_near = "" if near is None else f"as near as {near} in {near.calls}; "
            lines.append(f"{report.calls} calls: {as_near}{report.pays}")
    return lines
