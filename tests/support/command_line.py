"""Runs the command `ddpm-ext` in this process or in forked processes, and makes tiny models for it."""

import io
import json
import os
import shutil
import sys

import torch

from ddpm_ext import GaussianDiffusion, cli, models
from ddpm_ext.models import Classes
from ddpm_ext.models.folder import CONFIG
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.spacing import spaced_timesteps

TINY = {"sample_size": [8, 12], "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4}
TINY |= {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _on_cpu(arguments):
    """The arguments as text. Adds --device cpu if the command takes a device and the arguments name none.

    Without --device, the command would use the GPU if there is one.
    """
    commands = ("sample", "trajectory", "train", "invert", "bits-per-dim", "tune", "compare", "score")
    takes_device = arguments[:1] in {(name,) for name in commands}
    takes_device |= arguments[:2] in {("plot", "histogram"), ("plot", "guidance")}
    more = ("--device", "cpu") if takes_device and "--device" not in arguments else ()
    return [str(argument) for argument in (*arguments, *more)]


def call(*arguments):
    """Runs the command in this process, and returns its exit code."""
    try:
        return cli.main(_on_cpu(arguments))
    except SystemExit as stopped:
        return stopped.code


def check_refused(capsys, message, *arguments):
    """Checks that the command ends with exit code 2 and writes only one line, to stderr, which contains the message."""
    assert call(*arguments) == 2
    written = capsys.readouterr()
    assert message in written.err and (written.err.count("\n"), written.out) == (1, "")


def save_tiny(folder, **config):
    """Saves a tiny model of colour images of 8 by 12 pixels, with 20 timesteps, to a folder. Returns the folder.

    config: entries of the network's configuration that replace those of TINY.
    """
    torch.manual_seed(0)
    models.save_model(models.build_unet(TINY | config), DiffusionSettings(timesteps=20), folder)
    return folder


def save_pets(folder):
    """Saves a model like that of save_tiny, with three classes and a null class, to a folder. Returns the folder."""
    torch.manual_seed(1)
    unet = models.build_unet(TINY | {"num_class_embeds": 4})
    with torch.no_grad():
        unet.class_embedding.weight.mul_(5)  # so that the class changes the output more
    models.save_model(unet, DiffusionSettings(timesteps=20), folder, classes=Classes(("cat", "dog", "hen"), 3))
    return folder


def grid_of(steps, spacing="trailing", schedule="linear"):
    """The grid of a step table with `steps` steps, for a schedule of 1,000 timesteps."""
    gd = GaussianDiffusion(1000, schedule)
    return make_grid(gd.alphas_cumprod, spaced_timesteps(1000, steps, spacing), betas=gd.betas)


def not_finite(model, folder):
    """Copies a model to a folder, with a configuration that makes all of its outputs NaN. Returns the folder."""
    shutil.copytree(model, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"norm_eps": -1e9}))
    return folder


def as_process(folder, arguments, *, full=(), gone=(), unbuffered=False):
    """Runs a command in a forked process as a new process would run it. in_forks calls this in each fork.

    full: the streams (1 for stdout, 2 for stderr) that write to a full disk. gone: the streams that write to a pipe
        that nobody reads. unbuffered: whether the streams are unbuffered, as with PYTHONUNBUFFERED.
    """
    from support import forks

    reads, writes = os.pipe()
    os.close(reads)
    for number in full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    for number in gone:
        os.dup2(writes, number)
    if unbuffered:
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), write_through=True) for number in (1, 2))
    raise forks.Leave(call(*arguments))


def in_forks(folder, runs):
    """Runs commands in forked processes. A run is one command, with one process for each of its ranks.

    Returns the exit codes of the ranks, by the run's name.

    runs: the options of as_process for each rank, by the run's name.
    """
    from support import forks

    return forks.in_forks(__file__, folder, runs)


if __name__ == "__main__":
    from support import forks

    unet = ("diffusers", "diffusers.models.unets.unet_2d")
    forks.serve(as_process, *unet, "ddpm_ext.cli.sample", "safetensors.torch", "tqdm.auto", "PIL.Image")
