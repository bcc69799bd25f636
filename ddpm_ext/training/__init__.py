"""Trains a denoiser. A run that is killed and resumed ends with the same weights as one that was never stopped.

No random state is carried from one step to the next: the order of the images, their random transforms, the timesteps,
the noise and the dropout of a step depend only on the options and the step. (Timestep samplers that learn also use
earlier losses, which a checkpoint holds.) So a checkpoint is tensors and a few numbers.
"""

from ddpm_ext.training.hub import push_to_hub
from ddpm_ext.training.load_run import Trained, load
from ddpm_ext.training.options import TrainOptions, with_defaults_of
from ddpm_ext.training.outputs import Result
from ddpm_ext.training.post_hoc import PostHocAverage, post_hoc_average
from ddpm_ext.training.step import learning_rate
from ddpm_ext.training.trainer import Trainer, train

__all__ = [
    "PostHocAverage",
    "Result",
    "TrainOptions",
    "Trained",
    "Trainer",
    "learning_rate",
    "load",
    "post_hoc_average",
    "push_to_hub",
    "train",
    "with_defaults_of",
]
