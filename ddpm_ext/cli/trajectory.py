"""`ddpm-ext trajectory`: draws how samples develop from noise, as strips or a moving picture."""

from __future__ import annotations

import argparse
from typing import Any

from ddpm_ext import plots
from ddpm_ext.base import files
from ddpm_ext.cli.arguments import Subparsers, add_command, check_ending, whole_number
from ddpm_ext.cli.chosen_tables import name_of
from ddpm_ext.cli.sampling import are_finite, draw, prepare, refuse_not_finite, tell_choice
from ddpm_ext.cli.sampling_options import add_sampling
from ddpm_ext.plots.recorder import Recorder
from ddpm_ext.plots.style import plural

_ENDINGS = (".png", ".gif")
# Without --every, each (calls // number)-th call of the model is shown, or each call of a shorter loop; and the last.
_PICTURES = {".png": 10, ".gif": 60}
_EXAMPLES = """examples:
  ddpm-ext trajectory --num 5 --sampler ddpm --every 100 --out trajectory.png
  ddpm-ext trajectory --num 16 --sampler ddim --steps 50 --out trajectory.gif
  ddpm-ext trajectory --model shapes --class heart --guidance 2.5 --num 4 --out hearts.png"""


def add_parser(commands: Subparsers) -> None:
    description = "Draws x_t and the predicted x_0 at the same steps of the loop, for the first samples of the seed."
    parser = add_command(commands, "trajectory", description, epilog=_EXAMPLES)
    kinds = ".png: two strips; .gif: x_t and the predicted x_0 side by side, moving; both with the samples' classes"
    add_sampling(parser, num=8, out="trajectory.png", out_help=kinds)
    every = f"model calls between pictures (default: for about {_PICTURES['.png']}, or {_PICTURES['.gif']} in a GIF)"
    parser.add_argument_group("strips").add_argument("--every", type=whole_number(1), metavar="K", help=every)


def run(options: argparse.Namespace) -> None:
    """Writes x_t and the predicted clean samples along the loop to the picture `options.out`."""
    ending = check_ending(options.out, _ENDINGS)
    prepared = prepare(options, pictures=True)
    files.check_writable(options.out)
    tell_choice(prepared, options)
    every = options.every or max(1, prepared.calls // _PICTURES[ending])
    recorder = Recorder(prepared.model.unet, every, options.num)
    samples = draw(prepared, options, 0, options.num, recorder)
    shown = recorder.x_t, recorder.x_0, recorder.labels()
    titles: dict[str, Any] = {"name": name_of(options), "names": prepared.class_names(range(options.num))}
    if ending == ".gif":
        plots.save_gif(plots.trajectory_frames(*shown, **titles), options.out)
    else:
        plots.save_picture(plots.trajectory(*shown, **titles), options.out)
    shown_at = f"{len(recorder.t)} of {plural(recorder.calls, 'model call')}"
    print(f"{options.out}: {plural(options.num, 'sample')} at {shown_at}")
    refuse_not_finite(are_finite(samples).count(False), options.num, options.out)
