"""Every option of a training run changes its weights or its files, and the command line passes each on."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from support import trainer_run
from support.every_option import Another, Same, check_has_value, entries, options_of

from ddpm_ext import cli, training
from ddpm_ext.training import TrainOptions, train

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.subprocess, pytest.mark.slow]
BASE = trainer_run.UNET | {"data": "shapes", "image_size": 8, "timesteps": 20, "prediction": "v"}
BASE |= {"beta_schedule": "sigmoid", "warmup": 1}


class Weights(Another):
    """Another value that changes the weights."""


class Files(Another):
    """Another value that changes the files beside the weights, and no bit of the weights."""
