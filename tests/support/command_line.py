"""Runs `ddpm-ext` in a process of its own or in this one, and makes a tiny model for it."""

import json
import os
import shutil
import subprocess
import sys

import torch

from ddpm_ext import cli, models
from ddpm_ext.models.folder import CONFIG
from ddpm_ext.models.scheduler import DiffusionSettings

TINY = {
    "sample_size": [8, 12],
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _on_cpu(arguments):
    """The arguments as text, with --device cpu where there is no other: with a GPU, that would be the default."""
    commands = ("sample", "trajectory", "train", "invert", "bits-per-dim")
    takes_device = arguments[:1] in {(name,) for name in commands} or arguments[:2] == ("plot", "histogram")
    more = ("--device", "cpu") if takes_device and "--device" not in arguments else ()
    return [str(argument) for argument in (*arguments, *more)]


def run(*arguments, cwd=None, timeout=300):
    """Runs the command in a process of its own, for up to `timeout` seconds."""
    command = [sys.executable, "-m", "ddpm_ext", *_on_cpu(arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def call(*arguments):
    """Runs the command in this process, which is faster, and returns its exit code."""
    try:
        return cli.main(_on_cpu(arguments))
    except SystemExit as stopped:
        return stopped.code


def save_tiny(folder):
    """Saves a tiny colour model of 20 timesteps and 8 by 12 pixels to a folder."""
    torch.manual_seed(0)
    models.save_model(models.build_unet(TINY), DiffusionSettings(timesteps=20), folder)
    return folder


def not_finite(model, folder):
    """Copies a model to a folder, with a configuration that makes all its outputs NaN."""
    shutil.copytree(model, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"norm_eps": -1e9}))
    return folder
