"""`ddpm-ext train`: trains a denoiser, or resumes a run."""

from __future__ import annotations

import argparse
import math
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from ddpm_ext import training
from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.optional import has_bars
from ddpm_ext.cli import arguments
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.tables.schedules import SCHEDULES
from ddpm_ext.training import run_options
from ddpm_ext.training.options import CHANGEABLE, CHOICES, LIMITS

_EXAMPLES = """examples:
  ddpm-ext train --out my-digits
  ddpm-ext train --data photos --image-size 32 --flip --widths 64,128,256 --groups 32 --device cuda --out my-run
  ddpm-ext train --out my-run --resume
  ddpm-ext train --out my-run --resume --steps 10000 --change --lr 0.001 --lr-schedule linear
  torchrun --nproc-per-node 8 -m ddpm_ext train --data photos --image-size 64 --device cuda --out my-run"""


def add_parser(commands: arguments.Subparsers) -> None:
    description = "Trains a denoiser. A run may be killed at any time and resumed."
    _add_options(arguments.add_command(commands, "train", description, epilog=_EXAMPLES))


def run(options: argparse.Namespace) -> None:
    """Trains a model. With --resume, continues a run with its own options, except those that the command line sets."""
    arguments.check_device(options.device)
    names = set(training.TrainOptions.__dataclass_fields__)
    change: list[str] = []
    if not options.resume:
        if options.change:
            raise ValueError("change: belongs to --resume")
        chosen = training.TrainOptions(**{name: value for name, value in vars(options).items() if name in names})
    else:
        _, header = run_options.find(Path(options.out))
        typed_options = _on_command_line(options.arguments, names)
        _check_repeated(Path(options.out), header["options"], typed_options)
        chosen = training.with_defaults_of(header["options"], typed_options)
        change = [name for name in typed_options if options.change and name in CHANGEABLE]
    arguments.check_device(chosen.device)
    if chosen.score_every and chosen.features != training.TrainOptions.features:
        arguments.find_modules_here()
    result = training.train(
        chosen,
        options.out,
        resume=options.resume,
        change=change,
        command=shlex.join(["ddpm-ext", *options.arguments]),
        report=lambda text: print(text, flush=True),
        progress=not options.quiet and has_bars(tell=distributed.ranks().rank == 0),
    )
    if distributed.ranks().rank == 0:
        print(
            f"{result.folder}: final loss {result.final_loss:.4f}, {result.parameters:,} parameters, "
            f"{result.seconds:.0f} s"
        )


def _check_repeated(folder: Path, run_settings: dict[str, Any], typed: dict[str, Any]) -> None:
    """Raises ValueError if an option of the run imports code or sends data, and the command line does not repeat it.

    Otherwise an untrusted folder of a run could run code or send data.

    Args:
        run_settings: the options in the run's folder.
        typed: the options on the command line.
    """
    for name in ("features", "wandb", "push_to_hub"):
        value = run_settings.get(name)
        if name not in typed and value is not None and value != getattr(training.TrainOptions, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"resume: the run in {folder} has {option} {value}, which imports code or sends data, expected "
                f"{option} again on the command line"
            )


def _on_command_line(words: list[str], names: set[str]) -> dict[str, Any]:
    """{name: value} of those options in `names` that the command line sets, so without defaults."""
    parser = arguments.Parser(prog="ddpm-ext train")
    _add_options(parser)
    absent = object()  # argparse does not set the defaults of names that the namespace has
    options = argparse.Namespace(**dict.fromkeys(names, absent))
    parser.parse_args(words[words.index("train") + 1 :], options)
    return {name: value for name, value in vars(options).items() if name in names and value is not absent}


def _add_option(standard: training.TrainOptions, group: Any, name: str, help_text: str, **more: Any) -> None:
    """Adds the option for a field of TrainOptions to a group, with the field's default and its limits or choices.

    Args:
        standard: the default options.
        more: arguments of argparse's add_argument, which replace those from the field.
    """
    default = getattr(standard, name)
    if name in CHOICES:
        more = {"choices": CHOICES[name]} | more
    elif name in LIMITS:
        low, below, expected = LIMITS[name]
        if isinstance(default, int):
            highest = None if below == math.inf else int(below) - 1
            more = {"type": arguments.whole_number(int(low), highest), "metavar": "N"} | more
        else:
            more = {"type": arguments.number(low, expected, below=below), "metavar": "X"} | more
    elif default is False:
        more = {"action": "store_true"} | more
    elif isinstance(default, tuple):
        default = ",".join(map(str, default))  # the help shows the default in the form that the parser reads
    group.add_argument(f"--{name.replace('_', '-')}", **{"default": default, "help": help_text} | more)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field of TrainOptions, and --out, --resume, --change and --quiet."""
    standard = training.TrainOptions()
    add = partial(_add_option, standard, parser.add_argument_group("data"))
    data = "scikit-learn's handwritten digits, coloured shapes, your images, or an .npz of latents"
    add("data", data, metavar="digits|shapes|FOLDER|FILE")
    size = (
        "crop images to a square and resize them to N by N, or draw shapes of that size (default: that of all images)"
    )
    add("image_size", size, type=arguments.whole_number(1), metavar="N")
    add("channels", "grey or colour (default: 1 for digits, else 3)", type=int, choices=(1, 3))
    labels = "train a class-conditional model: labels are the sub-folders of a folder, or come with digits and shapes"
    add("classes", labels)
    add("class_dropout", "share of labels dropped, for classifier-free guidance; 0 for no null class")
    add("flip", "mirror images at random; not for digits")
    crop = "crop a folder's images at random, to squares of at least this share of the shorter side; 0: to the middle"
    add("random_crop", crop)
    add("skip_corrupt", "take the next image in place of one that can't be read")
    add("workers", "processes that read images ahead")

    add = partial(_add_option, standard, parser.add_argument_group("training"))
    add("steps", "optimizer steps")
    add("batch_size", "images a step, of all ranks")
    add("accumulate", "parts that each rank divides its images into, to save memory; changes dropout and rounding")
    add("lr", "highest learning rate")
    add("lr_schedule", "falls to 0 at the last step by a cosine or a line, or stays")
    add("warmup", "steps until the learning rate is reached")
    add("weight_decay", "of AdamW")
    averages = "decays of AdamW's averages of the gradient and of its square"
    add("betas", averages, type=arguments.numbers, metavar="A,B")
    add("adam_eps", "number that AdamW adds to the root of the average square")
    add("clip", "largest norm of the gradient; 0 for no limit")
    add("ema", "decay of the weights' moving average")
    more = "decays of further moving averages, each written to FOLDER/ema-X"
    add("extra_emas", more, type=arguments.numbers, default=argparse.SUPPRESS, metavar="A,B,...")
    snapshots = "steps between two snapshots, from which ddpm-ext average makes averages of any length; 0 for none"
    add("snapshot_every", snapshots)
    add("autocast", "lower precision of the model's arithmetic")
    again = "compute activations again in the backward pass, to save memory; the weights are the same"
    add("gradient_checkpointing", again)
    add("seed", "of weights, order, timesteps, noise and dropout")
    add("device", arguments.DEVICES_OF_RANKS, default=None, metavar="NAME")
    add("graph", "take each step by a CUDA graph; the weights are the same")

    add = partial(_add_option, standard, parser.add_argument_group("model (diffusers' UNet2DModel)"))
    config = "its config.json, or that of a DiTTransformer2DModel, in place of the next five options"
    add("model_config", config, metavar="FILE")
    add("widths", "channels, one number a level", type=arguments.whole_numbers, metavar="A,B,...")
    add("layers", "residual blocks a level")
    add("attention", "levels that have attention", type=arguments.whole_numbers, metavar="I,...")
    add("head_channels", "channels of a head of attention; more are faster")
    add("groups", "of the group norm")
    add("dropout", "in residual blocks")

    add = partial(_add_option, standard, parser.add_argument_group("diffusion"))
    add("timesteps", "steps of the schedule", type=arguments.steps)
    add("beta_schedule", "how fast the noise grows", choices=tuple(SCHEDULES))
    add("prediction", "what the model predicts", choices=SPACED_PREDICTIONS)
    add("variance", "of a reverse step; a learned one is half of the model's output")

    add = partial(_add_option, standard, parser.add_argument_group("loss"))
    add("loss", "of the prediction's error")
    add("delta", "error up to which huber is quadratic")
    add("weighting", "how much each timestep counts")
    add("timestep_sampler", "how often each timestep is drawn")
    add("logit_mean", "mean of logit_normal; above 0 for more noise")
    add("logit_std", "standard deviation of logit_normal")
    add("mode_scale", "how much more often mode draws middle timesteps, -1 to 1.75")
    add("vlb_weight", "weight of the variational bound in the loss, for a learned variance")
    add("offset_noise", "strength of noise that all pixels of a channel share")
    add("input_perturbation", "strength of further noise on the model's input only")

    group = parser.add_argument_group("output")
    add = partial(_add_option, standard, group)
    group.add_argument(
        "--out", required=True, metavar="FOLDER", help="for the model, checkpoints and losses (required)"
    )
    resume = "continue the run in the folder, with its options where none are given"
    group.add_argument("--resume", action="store_true", help=resume)
    change = "with --resume: options given here may differ from the run's; --steps always may"
    group.add_argument("--change", action="store_true", help=change)
    add("checkpoint_every", "steps between two checkpoints")
    add("keep", "number of checkpoints to keep")
    add("log_every", "steps between two lines")
    add("sample_every", "steps between two grids of samples; 0 for none")
    add("sample_steps", "DDIM's steps for a grid or score")
    add("sample_count", "samples in a grid")
    add("score_every", "steps between two scores of samples; FOLDER/best has the model with the best score; 0 for none")
    add("score_count", "samples for a score")
    features = "the score is the Fréchet distance to the training images of: pixels, or a function of your own"
    add("features", features, metavar="pixels|MODULE:FUNCTION")
    tables = "at the end tune step tables with these numbers of model calls, for ddpm-ext sample --sampler tuned"
    usual = {"nargs": "?", "const": (4, 6, 8, 10), "default": argparse.SUPPRESS}
    add("tune", f"{tables} (without numbers: 4,6,8,10)", type=arguments.whole_numbers, metavar="N,...", **usual)
    add("tensorboard", "also write events for TensorBoard, to FOLDER/tensorboard")
    add("wandb", "also log to this project of Weights & Biases, by its package wandb", metavar="PROJECT")
    add("weights_dtype", "of the final model file")
    hub = "upload the model at the end to this repository of the Hugging Face Hub, by diffusers"
    add("push_to_hub", hub, metavar="REPO")
    add("hub_private", "make that repository private, if it is new")
    group.add_argument("--quiet", action="store_true", help="show no progress bar")
