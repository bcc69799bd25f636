"""Trains a denoiser. A run that is killed and resumed ends with the same weights as one that never stopped.

Nothing random is kept between two steps: the order of the images, what their transforms draw, the timesteps, the noise
and the dropout of a step all follow from (seed, step). So a checkpoint is only tensors and a few numbers.
"""

from ddpm_ext.training.options import TrainOptions, with_defaults_of
from ddpm_ext.training.outputs import Result
from ddpm_ext.training.step import learning_rate
from ddpm_ext.training.trainer import Trainer, train

__all__ = ["Result", "TrainOptions", "Trainer", "learning_rate", "train", "with_defaults_of"]
