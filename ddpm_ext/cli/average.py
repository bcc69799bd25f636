"""`ddpm-ext average`: averages a training run's weights over another length than the run did, from its snapshots."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ddpm_ext.base import files
from ddpm_ext.cli.arguments import Subparsers, add_command, positive_number
from ddpm_ext.cli.network import network_for
from ddpm_ext.cli.sampling_options import add_network
from ddpm_ext.training import post_hoc_average
from ddpm_ext.training.checkpoints import remove_leftovers
from ddpm_ext.training.network import save_result
from ddpm_ext.training.power_average import LONGEST

_ABOUT = "average.json"
_EXAMPLES = """examples:
  ddpm-ext train --snapshot-every 250 --out my-run
  ddpm-ext average my-run --length 0.15
  ddpm-ext sample --model my-run/average-0.15 --num 64 --out samples.png"""


def add_parser(commands: Subparsers) -> None:
    description = (
        "Makes a model whose weights are averaged over another length than those of the run, from the run's snapshots: "
        "post-hoc EMA."
    )
    parser = add_command(commands, "average", description, takes="RUN ", epilog=_EXAMPLES)
    add = parser.add_argument
    add("run", metavar="RUN", help="the folder of a run of ddpm-ext train --snapshot-every, which may go on")
    length = f"deviation of the averaged steps as a share of the training, up to {LONGEST}, the mean of all (required)"
    add("--length", type=positive_number, required=True, metavar="X", help=length)
    add_network(parser)
    add("--out", metavar="FOLDER", help="folder for the model (default: RUN/average-X)")


def run(options: argparse.Namespace) -> None:
    """Writes the averaged model to a folder, as a finished run writes its model, and average.json about it."""
    folder = Path(options.run) / f"average-{options.length:g}" if options.out is None else Path(options.out)
    files.remove_leftovers(folder, of=folder / _ABOUT)
    if folder.exists() and not (folder / _ABOUT).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out: {folder} holds something else, expected a new folder or one of ddpm-ext average")
    result = post_hoc_average(options.run, options.length, network_for(Path(options.run), options.network))
    trained = result.trained
    files.check_writable(folder / _ABOUT)
    remove_leftovers(folder)
    about = {"run": options.run, "length": options.length, "step": result.step, "snapshots": result.snapshots}
    # This file is written before the model. If writing the model fails, the file shows that this command made the
    # folder, so that a second call of the command accepts it.
    files.write_json(folder / _ABOUT, about | {"distance": result.distance})
    described = trained.shape, trained.classes, trained.clip
    save_result(trained.model, trained.settings, folder, torch.float32, *described)
    print(
        f"{folder}: average of length {options.length:g} at step {result.step}, from {result.snapshots} snapshots; its "
        f"profile is within {result.distance:.1%} of the exact one"
    )
