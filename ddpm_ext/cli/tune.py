"""`ddpm-ext tune`: step tables that are fitted to a model, so that it is called a few times only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.cli import compare
from ddpm_ext.cli.arguments import Subparsers, add_command
from ddpm_ext.cli.network import model_hash
from ddpm_ext.models import tuned
from ddpm_ext.tuning import Report
from ddpm_ext.tuning.report import WHOLE_TIMESTEPS

_EXAMPLES = """examples:
  ddpm-ext tune --model my-run --steps 4,6,8,10
  ddpm-ext sample --model my-run --sampler tuned --steps 6 --out samples.png
  ddpm-ext tune --model shapes --guidance 2.5 --steps 6 --out tables --plot tune.png
  ddpm-ext sample --model shapes --guidance 2.5 --table tables/6-guidance-2.5.json --out shapes.png"""


def add_parser(commands: Subparsers) -> None:
    description = (
        "Fits step tables to a model: their few steps end near to where many steps would. The model is only called."
    )
    parser = add_command(commands, "tune", description, epilog=_EXAMPLES)
    counts = "steps of the tables, in each of which the model is called once"
    output = compare.add_options(parser, "steps", counts, seeds="samples to fit to; as many again are held out")
    folder = f"folder for the tables, N.json or with guidance N-guidance-X.json (default: {tuned.FOLDER}/ of the model)"
    output.add_argument("--out", metavar="FOLDER", help=folder)


def run(options: argparse.Namespace) -> None:
    """Writes the tables, and prints how near they come."""
    loaded, tuner, counts = compare.prepare(options, "steps")
    folder = loaded.model.folder / tuned.FOLDER if options.out is None else Path(options.out)
    paths = {count: folder / tuned.table_name(count, options.guidance) for count in counts}
    for path in paths.values():
        files.check_writable(path)
    sha256 = model_hash(loaded.model)
    chosen = {} if options.classes is None else {"classes": options.classes}
    print(f"at most {tuner.planned_calls(counts):,} calls of the model", flush=True)
    reports = []
    for count, path in paths.items():
        found = tuner.tune(count)
        table = replace(found.table, notes=found.table.notes | chosen)
        tuned.save_tuned(table, path, model_sha256=sha256, seed=options.seed)
        print(path, flush=True)
        reports.append(found.report)
    print(
        f"{tuner.calls:,} calls of the model; the many steps' own error is {tuner.teacher_error:.2%} of a sample's size"
    )
    if tuner.whole_timesteps:
        print(WHOLE_TIMESTEPS)
    print("\n".join(_lines(reports)))
    if options.plot is not None:
        plots.tuning_figure(reports, options.plot)
        print(options.plot)


def _lines(reports: Sequence[Report]) -> list[str]:
    lines = ["calls   tuned table   best name"]
    for report in reports:
        kept = "" if report.fitted else f"; no fit is nearer ({report.fitted_error:.4f}), so the table is this name's"
        lines.append(f"{report.calls:>5}  {report.error:>12.4f}  {report.best.error:>10.4f}  {report.best}{kept}")
    for report in reports:
        lines.append(f"the best name for {report.calls} calls: {compare.typed(report.best)}")
        if report.fitted:
            near = report.as_near
            as_near = "" if near is None else f"as near as {near} in {near.calls}; "
            lines.append(f"{report.calls} calls: {as_near}{report.pays}")
    return lines
