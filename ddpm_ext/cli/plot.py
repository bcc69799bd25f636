"""`ddpm-ext plot`: schedules, step tables, samples and the loop that makes them, as pictures."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

# The module and not its names: it imports this one, too.
from ddpm_ext.base import files
from ddpm_ext.cli import arguments as options
from ddpm_ext.loop.rows import SIGMA_GRIDS
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA
from ddpm_ext.tables.schedules import SCHEDULES
from ddpm_ext.tables.spacing import Grid, make_grid, spaced_timesteps
from ddpm_ext.tables.step_table import StepTable

if TYPE_CHECKING:
    from ddpm_ext.diffusion import GaussianDiffusion
    from ddpm_ext.plots import Pixels

__all__ = ["add_parser", "run"]

FIGURES = (".png", ".svg", ".pdf")
PICTURES = (".png",)
MOMENTS = 100  # of a histogram over time

EXAMPLES = {
    "schedules": """
  ddpm-ext plot schedules --out schedules.png
  ddpm-ext plot schedules linear cosine --timesteps 4000 --out schedules.svg""",
    "table": """
  ddpm-ext plot table ddim --steps 50 --spacing trailing --eta 0.5 --out ddim.png
  ddpm-ext plot table ddpm ddim euler_ancestral --steps 20 --against timestep --out samplers.png
  ddpm-ext plot table mine.json ddim --steps 50 --out mine.png""",
    "grid": """
  ddpm-ext sample --num 64 --out samples.npz
  ddpm-ext plot grid samples.npz --columns 16 --out grid.png""",
    "trajectory": """
  ddpm-ext plot trajectory --num 5 --every 100 --out trajectory.png
  ddpm-ext plot trajectory --num 16 --sampler ddim --steps 50 --out trajectory.gif""",
    "histogram": """
  ddpm-ext plot histogram --num 256 --sampler ddim --steps 100 --out histogram.png""",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Adds `plot` with its kinds of pictures to ddpm-ext's commands; run() takes what is parsed."""
    plot = subparsers.add_parser(
        "plot",
        usage="ddpm-ext plot KIND [options]",
        help="draw schedules, step tables, samples and how they come about",
        description="Draws a picture.",
        epilog="ddpm-ext plot KIND --help tells more.",
        formatter_class=options._Formatter,
    )
    plot.prog = "ddpm-ext plot"
    kinds = plot.add_subparsers(dest="kind", required=True, metavar="KIND", title="kinds of pictures")

    def add(name: str, takes: str, summary: str) -> argparse.ArgumentParser:
        made = kinds.add_parser(
            name,
            usage=f"ddpm-ext plot {name} {takes}[options]",
            help=summary,
            description=f"Draws {summary}.",
            epilog=f"examples:{EXAMPLES[name]}",
            formatter_class=options._Formatter,
        )
        made.prog = f"ddpm-ext plot {name}"
        return made

    _add_schedules(add("schedules", "[NAME ...] ", "alphas_cumprod and the signal-to-noise ratio of schedules"))
    _add_table(add("table", "SAMPLER|FILE ... ", "the columns of step tables over the steps"))
    _add_grid(add("grid", "FILE ", "samples that lie in a file, as a grid"))
    loop = add("trajectory", "", "x_t and the predicted x_0 along the loop, as ddpm-ext trajectory")
    options._add_sampling(loop, num=8, many=False, out="trajectory.png", out_help=".png: two strips; .gif: moving")
    every = "steps between two pictures (default: about ten in all, 60 in a GIF)"
    loop.add_argument("--every", type=options._whole(1), metavar="K", help=every)
    values = add("histogram", "", "how the values of x_t are distributed along the loop")
    options._add_sampling(values, num=64, many=False, out="histogram.png", out_help=_endings(FIGURES))
    add_option = values.add_argument_group("histogram").add_argument
    add_option("--bins", type=options._whole(1, 10000), default=80, metavar="N", help="of the values")
    limit = "values from -X to X are shown (default: all)"
    add_option("--limit", type=options._number(0, "a number > 0", above=True), metavar="X", help=limit)
    return plot


def _endings(endings: tuple[str, ...]) -> str:
    return f"ends in {' or '.join(endings)}"


def _schedule(name: str) -> str:
    """As argparse's choices, which it can't combine with none given."""
    if name not in SCHEDULES:
        raise argparse.ArgumentTypeError(f"got {name}, expected {', '.join(SCHEDULES)}")
    return name


def _add_schedules(parser: argparse.ArgumentParser) -> None:
    every = ", ".join(SCHEDULES)
    parser.add_argument("names", nargs="*", type=_schedule, metavar="NAME", help=f"{every} (default: all)")
    parser.add_argument("--timesteps", type=options._whole(1), default=1000, metavar="N", help="steps of the schedules")
    parser.add_argument("--out", default="schedules.png", metavar="FILE", help=_endings(FIGURES))


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SAMPLER|FILE",
        help=f"{', '.join(SAMPLERS)}, or a .json file that StepTable.save wrote; several are laid over one another",
    )
    add = parser.add_argument_group("of samplers").add_argument
    add("--steps", type=options._whole(1), metavar="N", help="steps of the loop (default: all)")
    add("--spacing", metavar="NAME", help="linspace, leading, trailing, quadratic, ddim50, 10,20, karras, log_snr")
    add("--eta", type=options._number(0, "a number >= 0"), metavar="X", help=f"of {' or '.join(WITH_ETA)}")
    add("--prediction", choices=SPACED_PREDICTIONS, default="eps", help="what the model predicts")
    add("--beta-schedule", choices=tuple(SCHEDULES), default="linear", help="how fast the noise grows")
    add("--timesteps", type=options._whole(1), default=1000, metavar="N", help="steps of the schedule")
    add = parser.add_argument_group("output").add_argument
    add("--against", choices=("step", "timestep"), default="step", help="the horizontal axis")
    add("--out", default="table.png", metavar="FILE", help=_endings(FIGURES))


def _add_grid(parser: argparse.ArgumentParser) -> None:
    what = ".npz that ddpm-ext sample wrote, or .npy: uint8 (num, height, width, channels) or floats "
    parser.add_argument("file", metavar="FILE", help=f"{what}(num, channels, height, width) in [-1, 1]")
    parser.add_argument("--num", type=options._whole(1), metavar="N", help="the first N samples (default: all)")
    parser.add_argument("--columns", type=options._whole(1), metavar="N", help="(default: about square)")
    enlarged = "times that each pixel is enlarged (default: as makes small images visible)"
    parser.add_argument("--scale", type=options._whole(1, 1000), metavar="N", help=enlarged)
    parser.add_argument("--out", default="grid.png", metavar="FILE", help=_endings(PICTURES))


# ---------------------------------------------------------------------------------------------------- what they do


def run(given: argparse.Namespace) -> None:
    """Draws the picture that add_parser's options describe, and prints its path and what it shows.

    Raises:
        TypeError, ValueError: an option out of range, a file that can't be read or written. MissingExtra: matplotlib,
        pillow or what the model needs is not installed.
    """
    draw: dict[str, Callable[[argparse.Namespace], str]] = {
        "schedules": _draw_schedules,
        "table": _draw_table,
        "grid": _draw_grid,
        "histogram": _draw_histogram,
    }
    if given.kind == "trajectory":
        from ddpm_ext.cli import commands

        commands.trajectory(given)
    else:
        print(f"{given.out}: {draw[given.kind](given)}")


def _check_out(out: str, endings: tuple[str, ...]) -> None:
    if Path(out).suffix.lower() not in endings:
        raise ValueError(f"out: got {out}, expected a name that {_endings(endings)}")
    files.check_writable(out)


def _draw_schedules(given: argparse.Namespace) -> str:
    from ddpm_ext.diffusion import GaussianDiffusion
    from ddpm_ext.plots import schedule_figure

    _check_out(given.out, FIGURES)
    names = given.names or tuple(SCHEDULES)
    schedule_figure({name: GaussianDiffusion(given.timesteps, name).alphas_cumprod for name in names}, given.out)
    return f"{', '.join(dict.fromkeys(names))}, {given.timesteps} timesteps"


def _draw_table(given: argparse.Namespace) -> str:
    from ddpm_ext.plots.step_tables import step_table_figure

    _check_out(given.out, FIGURES)
    samplers = [source for source in given.sources if source in SAMPLERS]
    if not samplers:
        for name in ("steps", "spacing", "eta"):
            if getattr(given, name) is not None:
                raise ValueError(f"{name}: got {getattr(given, name)}, but no sampler is to be drawn, only files")
    elif given.eta is not None and not set(samplers) & set(WITH_ETA):
        raise ValueError(f"eta: got {given.eta}, but it belongs to {' or '.join(WITH_ETA)}")
    tables = {source: _table(source, given) for source in given.sources}
    step_table_figure(next(iter(tables.values())) if len(tables) == 1 else tables, given.out, against=given.against)
    return ", ".join(f"{source} ({len(table)} row{'s' * (len(table) != 1)})" for source, table in tables.items())


def _table(source: str, given: argparse.Namespace) -> StepTable:
    from ddpm_ext.diffusion import GaussianDiffusion

    if source in SAMPLERS:
        diffusion = GaussianDiffusion(given.timesteps, given.beta_schedule)
        eta: dict[str, Any] = {} if given.eta is None or source not in WITH_ETA else {"eta": given.eta}
        return SAMPLERS[source](_grid(diffusion, given), prediction=given.prediction, **eta)
    if Path(source).suffix.lower() != ".json":
        expected = f"{', '.join(SAMPLERS)} or a .json file that StepTable.save wrote"
        raise ValueError(f"table: got {source}, expected {expected}")
    try:
        return StepTable.load(source)
    except OSError as error:
        raise ValueError(f"table: cannot read {source}: {error.strerror or error}") from error


def _grid(diffusion: GaussianDiffusion, given: argparse.Namespace) -> Grid:
    if given.spacing in SIGMA_GRIDS:
        if given.steps is None:
            raise ValueError(f"steps: none given, expected a number for spacing {given.spacing}")
        return SIGMA_GRIDS[given.spacing](diffusion.alphas_cumprod, given.steps)
    chosen = spaced_timesteps(given.timesteps, given.steps, given.spacing or "linspace")
    return make_grid(diffusion.alphas_cumprod, chosen, betas=diffusion.betas)


def _draw_grid(given: argparse.Namespace) -> str:
    from ddpm_ext import plots

    _check_out(given.out, PICTURES)
    images = _read_samples(given.file)
    images = images[: given.num]
    plots.save_picture(plots.grid(images, columns=given.columns, scale=given.scale), given.out)
    return f"{len(images)} samples, {'x'.join(map(str, images.shape[1:]))}"


def _read_samples(path: str) -> Pixels:
    """(num, height, width, channels) uint8, of an .npz's arr_0 or an .npy."""
    from ddpm_ext import plots

    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.lib.npyio.NpzFile):
            with found:
                if "arr_0" not in found:
                    raise ValueError(f"it holds {', '.join(found) or 'nothing'}, expected arr_0")
                found = found["arr_0"]
    except OSError as error:
        raise ValueError(f"file: cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"file: {path} is no .npz or .npy of samples ({error})") from error
    if found.dtype.kind == "f" and found.ndim == 4:
        return plots.to_uint8(torch.from_numpy(found.astype(np.float32)))
    if found.dtype != np.uint8 or found.ndim != 4:
        expected = "uint8 (num, height, width, channels) or floats (num, channels, height, width)"
        raise ValueError(f"file: {path} holds {found.dtype} of shape {found.shape}, expected {expected}")
    return found


def _draw_histogram(given: argparse.Namespace) -> str:
    from ddpm_ext.base.optional import require
    from ddpm_ext.cli import commands
    from ddpm_ext.plots import histogram_figure
    from ddpm_ext.plots.recorder import Recorder

    _check_out(given.out, FIGURES)
    require("matplotlib", "drawing a histogram")
    model, diffusion, steps = commands.prepare(given, pictures=False)
    every = max(1, steps // MOMENTS)
    recorder = Recorder(model.unet, every, steps, given.num)
    samples = commands.draw(model, diffusion, given, 0, given.num, recorder)
    # Heun's method comes twice to a timestep
    new = [i for i, t in enumerate(recorder.t) if i == 0 or t < recorder.t[i - 1]]
    timesteps, moments = [recorder.t[i] for i in new], [recorder.x_t[i] for i in new]
    histogram_figure(moments, timesteps, given.out, samples=samples, bins=given.bins, limit=given.limit)
    return f"{given.num} samples at {len(moments)} of {steps} steps"
