"""`ddpm-ext plot`: draws schedules, step tables, losses and samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.base.optional import require
from ddpm_ext.cli import arguments, table
from ddpm_ext.cli.chosen_tables import name_of
from ddpm_ext.cli.images import read_pixels
from ddpm_ext.cli.sampling import draw, prepare, tell_choice
from ddpm_ext.cli.sampling_options import add_sampling
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.plots.recorder import Recorder
from ddpm_ext.plots.style import plural
from ddpm_ext.tables.schedules import SCHEDULES
from ddpm_ext.training.log import curve_title, read_losses, read_quarters
from ddpm_ext.training.run_options import OPTIONS

DrawKind = Callable[[argparse.Namespace], str]
"""A function that draws a picture for the options, and returns a description of the picture."""
_PICTURES = (".png",)  # the ending of pictures that consist of samples
# Every (calls // _HISTOGRAMS)-th call of the model is drawn, or each call of a shorter loop; and the last.
_HISTOGRAMS = 100

_EXAMPLES = {
    "schedules": """examples:
  ddpm-ext plot schedules --out schedules.png
  ddpm-ext plot schedules linear cosine --timesteps 4000 --out schedules.svg""",
    "table": """examples:
  ddpm-ext plot table ddim --steps 50 --spacing trailing --eta 0.5 --out ddim.png
  ddpm-ext plot table ddpm ddim euler_ancestral --steps 20 --against timestep --out samplers.png
  ddpm-ext plot table mine.json ddim --steps 50 --out mine.png""",
    "grid": """examples:
  ddpm-ext sample --num 64 --out samples.npz
  ddpm-ext plot grid samples.npz --columns 16 --out grid.png""",
    "guidance": """examples:
  ddpm-ext plot guidance --num 10 --guidance 0,1,2.5,5 --sampler ddim --steps 25 --out guidance.png
  ddpm-ext plot guidance --model my-run --class cat,dog --num 6 --out cats-and-dogs.png""",
    "losses": """examples:
  ddpm-ext plot losses my-run --out losses.svg""",
    "histogram": """examples:
  ddpm-ext plot histogram --num 256 --sampler ddim --steps 100 --out histogram.png""",
}


def add_parser(commands: arguments.Subparsers) -> None:
    plot = arguments.add_command(
        commands,
        "plot",
        "Draws a picture.",
        takes="KIND ",
        epilog="ddpm-ext plot KIND --help shows a kind's options.",
    )
    kinds = plot.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds of pictures")

    def add(name: str, takes: str, summary: str, draw_kind: DrawKind) -> argparse.ArgumentParser:
        description, epilog = f"Draws {summary}.", _EXAMPLES[name]
        parser = arguments.add_command(kinds, f"plot {name}", description, summary=summary, takes=takes, epilog=epilog)
        parser.set_defaults(draw_kind=draw_kind)
        return parser

    _add_schedules(
        add("schedules", "[NAME ...] ", "alphas_cumprod and the signal-to-noise ratio of schedules", _draw_schedules)
    )
    _add_table(add("table", "SAMPLER|FILE ... ", "the columns of step tables over the steps", _draw_table))
    _add_grid(add("grid", "FILE ", "samples from a file, as a grid", _draw_grid))
    _add_guidance(add("guidance", "", "samples of a class-conditional model with rising guidance", _draw_guidance))
    _add_losses(
        add("losses", "RUN ", "the loss of each step of a training run, and by quarter of the timesteps", _draw_losses)
    )
    _add_histogram(add("histogram", "", "how the values of x_t are distributed along the loop", _draw_histogram))


def run(options: argparse.Namespace) -> None:
    """Draws the picture that the options describe, and prints its path and a description."""
    arguments.check_out(options.out, _PICTURES if options.kind in ("grid", "guidance") else arguments.FIGURES)
    print(f"{options.out}: {options.draw_kind(options)}")


# ------------------------------------------------------------------------------------------------------- schedules


def _add_schedules(parser: argparse.ArgumentParser) -> None:
    all_names = ", ".join(SCHEDULES)
    parser.add_argument("names", nargs="*", type=_schedule, metavar="NAME", help=f"{all_names} (default: all)")
    parser.add_argument("--timesteps", type=arguments.steps, default=1000, metavar="N", help="steps of the schedules")
    parser.add_argument("--out", default="schedules.png", metavar="FILE", help=arguments.endings_help())


def _schedule(name: str) -> str:
    """Parses a schedule's name. With argparse's `choices`, an empty list of names would be an error."""
    if name not in SCHEDULES:
        raise argparse.ArgumentTypeError(f"got {name}, expected {', '.join(SCHEDULES)}")
    return name


def _draw_schedules(options: argparse.Namespace) -> str:
    names = options.names or tuple(SCHEDULES)
    levels = {name: GaussianDiffusion(options.timesteps, name).alphas_cumprod for name in names}
    plots.schedule_figure(levels, options.out)
    return f"{', '.join(levels)}, {options.timesteps} timesteps"


# ----------------------------------------------------------------------------------------------------- step tables


def _add_table(parser: argparse.ArgumentParser) -> None:
    sources = f"{table.SOURCES}; several are drawn together"
    parser.add_argument("sources", nargs="+", type=table.source_name, metavar="SAMPLER|FILE", help=sources)
    table.add_options(parser)
    add = parser.add_argument_group("output").add_argument
    add("--against", choices=("step", "timestep"), default="step", help="the horizontal axis")
    layout = "of several tables: a panel for each column, or for each table"
    add("--panels", choices=("columns", "tables"), default="columns", help=layout)
    add("--out", default="table.png", metavar="FILE", help=arguments.endings_help())


def _draw_table(options: argparse.Namespace) -> str:
    table.check_options(options, options.sources)
    tables = {source: table.table_of(source, options) for source in options.sources}
    plots.step_table_figure(tables, options.out, against=options.against, panels=options.panels)
    return ", ".join(f"{source} ({len(rows)} row{'s' * (len(rows) != 1)})" for source, rows in tables.items())


# --------------------------------------------------------------------------------------------------------- samples


def _add_grid(parser: argparse.ArgumentParser) -> None:
    kinds = (
        ".npz that ddpm-ext sample wrote, or .npy: uint8 (num, height, width, channels) or floats "
        "(num, channels, height, width) in [-1, 1]"
    )
    parser.add_argument("file", metavar="FILE", help=kinds)
    parser.add_argument("--num", type=arguments.whole_number(1), metavar="N", help="the first N samples (default: all)")
    columns = "samples in a row (default: for a grid that is about square)"
    parser.add_argument("--columns", type=arguments.whole_number(1), metavar="N", help=columns)
    scale = "factor by which each pixel is enlarged (default: so that small images become visible)"
    parser.add_argument("--scale", type=arguments.whole_number(1, 1000), metavar="N", help=scale)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help=arguments.endings_help(_PICTURES))


def _draw_grid(options: argparse.Namespace) -> str:
    images = read_pixels(options.file)[: options.num]
    plots.save_picture(plots.grid(images, columns=options.columns, scale=options.scale), options.out)
    return f"{plural(len(images), 'sample')}, {'x'.join(map(str, images.shape[1:]))}"


# -------------------------------------------------------------------------------------------------------- guidance


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    kinds = "ends in .png: a row for each scale, a column for each sample"
    add_sampling(parser, num=10, out="guidance.png", out_help=kinds, model="shapes", scales="0,1,2.5,5")


def _draw_guidance(options: argparse.Namespace) -> str:
    prepared = prepare(options, pictures=True)
    tell_choice(prepared, options)
    options_of_scale = argparse.Namespace(**vars(options))
    rows = []
    for options_of_scale.guidance in options.guidance:
        rows.append(draw(prepared, options_of_scale, 0, options.num).float().cpu())
    names = prepared.class_names(range(options.num))  # not empty: prepare refuses guidance for a model without classes
    scales = ", ".join(f"{scale:g}" for scale in options.guidance)
    title = f"guidance {scales}, from top to bottom" if len(options.guidance) > 1 else f"guidance {scales}"
    plots.save_strips(list(torch.stack(rows, 1)), names, title, options.out)
    return f"{plural(options.num, 'sample')} with guidance {scales}"


# ------------------------------------------------------------------------------------------------------------- losses


def _add_losses(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a training run, or its losses.csv")
    parser.add_argument("--out", default="losses.png", metavar="FILE", help=arguments.endings_help())


def _draw_losses(options: argparse.Namespace) -> str:
    source = Path(options.run)
    path = source / "losses.csv" if source.is_dir() else source
    losses = read_losses(path)
    if not losses:
        raise ValueError(f"run: {path} has no losses, expected the folder of a run of ddpm-ext train")
    try:
        title = {"title": curve_title(files.read_json(path.with_name(OPTIONS))["options"])}
    except (OSError, ValueError, TypeError, KeyError):  # a losses.csv without the options of its run
        title = {}
    plots.save_loss_curve(losses, options.out, quarters=read_quarters(path), **title)
    return f"losses of {plural(len(losses), 'step')}"


# ------------------------------------------------------------------------------------------------------- histogram


def _add_histogram(parser: argparse.ArgumentParser) -> None:
    add_sampling(parser, num=64, out="histogram.png", out_help=arguments.endings_help())
    add = parser.add_argument_group("histogram").add_argument
    add("--bins", type=arguments.whole_number(1, 10000), default=80, metavar="N", help="number of bins of the values")
    add("--limit", type=arguments.positive_number, metavar="X", help="show values from -X to X (default: all)")


def _draw_histogram(options: argparse.Namespace) -> str:
    require("matplotlib", "drawing a histogram")
    prepared = prepare(options, pictures=False)
    if prepared.calls < 2:
        raise ValueError(f"steps: got {prepared.steps}, expected at least 2 for a histogram")
    tell_choice(prepared, options)
    every = max(1, prepared.calls // _HISTOGRAMS)
    recorder = Recorder(prepared.model.unet, every, options.num)
    samples = draw(prepared, options, 0, options.num, recorder)
    # Heun's method and RePaint's jumps come to a timestep several times; only the first visit is shown.
    first_visits = [i for i, t in enumerate(recorder.t) if all(t < earlier for earlier in recorder.t[:i])]
    timesteps, x_t = [recorder.t[i] for i in first_visits], [recorder.x_t[i] for i in first_visits]
    shown = {"bins": options.bins, "limit": options.limit, "name": name_of(options)}
    plots.histogram_figure(x_t, timesteps, options.out, samples=samples, **shown)
    return f"{plural(options.num, 'sample')} at {len(x_t)} of {plural(recorder.calls, 'model call')}"
