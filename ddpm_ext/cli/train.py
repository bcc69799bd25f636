"""`ddpm-ext train`: trains a denoiser, or resumes a run."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ddpm_ext import training
from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.optional import has_bars
from ddpm_ext.cli.arguments import (
    DEVICES_OF_RANKS,
    Parser,
    Subparsers,
    add_command,
    check_device,
    finite_number,
    nonnegative_number,
    number,
    numbers,
    positive_number,
    seed,
    steps,
    whole_number,
    whole_numbers,
)
from ddpm_ext.losses.timestep_samplers import TIMESTEP_SAMPLERS
from ddpm_ext.ops.loss_kinds import BOUNDS, LOSSES
from ddpm_ext.tables.predictions import SPACED_PREDICTIONS
from ddpm_ext.tables.schedules import SCHEDULES
from ddpm_ext.tables.variances import TRAINABLE_VARIANCES
from ddpm_ext.tables.weightings import WEIGHTINGS
from ddpm_ext.training import run_options
from ddpm_ext.training.options import AUTOCAST, CHANGEABLE, DTYPES, LR_SCHEDULES

__all__ = ["add_parser", "run"]

_EXAMPLES = """examples:
  ddpm-ext train --out my-digits
  ddpm-ext train --data photos --image-size 32 --flip --widths 64,128,256 --groups 32 --device cuda --out my-run
  ddpm-ext train --out my-run --resume
  ddpm-ext train --out my-run --resume --steps 10000 --change --lr 0.001 --lr-schedule linear
  torchrun --nproc-per-node 8 -m ddpm_ext train --data photos --image-size 64 --device cuda --out my-run"""


def add_parser(commands: Subparsers) -> None:
    """Adds `train` to the commands of ddpm-ext."""
    description = "Trains a denoiser. A run may be killed at any time and resumed."
    _add_options(add_command(commands, "train", "train a model", description, epilog=_EXAMPLES))


def run(options: argparse.Namespace) -> None:
    """Trains, or with --resume continues a run: then an option that is not given has the value that the run has."""
    check_device(options.device)
    names = {field.name for field in fields(training.TrainOptions)}
    change: list[str] = []
    if not options.resume:
        if options.change:
            raise ValueError("change: belongs to --resume")
        chosen = training.TrainOptions(**{name: value for name, value in vars(options).items() if name in names})
    else:
        _, found = run_options.find(Path(options.out), report=lambda text: None)
        given = _given(options.arguments, names)
        chosen = training.with_defaults_of(found["options"], given)
        change = [name for name in given if options.change and name in CHANGEABLE]
        check_device(chosen.device)
    if chosen.score_every and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where the module of --features may lie
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


def _given(arguments: list[str], names: set[str]) -> dict[str, Any]:
    """Those of the named options that the command line has, without the defaults of the others."""
    parser = Parser(prog="ddpm-ext train")
    _add_options(parser)
    absent = object()  # argparse sets a default only where the namespace has no value
    options = argparse.Namespace(**dict.fromkeys(names, absent))
    parser.parse_args(arguments[arguments.index("train") + 1 :], options)
    return {name: value for name, value in vars(options).items() if name in names and value is not absent}


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options, named as the fields of TrainOptions, and besides --out, --resume, --change, --quiet."""
    std = training.TrainOptions()
    add = parser.add_argument_group("data").add_argument
    data = "scikit-learn's handwritten digits, coloured shapes, or your images"
    add("--data", default=std.data, metavar="digits|shapes|FOLDER", help=data)
    size = "crop images to a square and resize them to N by N, or draw shapes of that size"
    add("--image-size", type=whole_number(1), metavar="N", help=size)
    add("--channels", type=int, choices=(1, 3), help="grey or colour (default: 1 for digits, else 3)")
    labels = "train a class-conditional model: labels are the sub-folders of a folder, or come with digits and shapes"
    add("--classes", action="store_true", help=labels)
    drop = "share of labels dropped, for classifier-free guidance; 0 for no null class"
    below_1 = number(0, "in [0, 1)", below=1)
    add("--class-dropout", type=below_1, default=std.class_dropout, metavar="X", help=drop)
    add("--flip", action="store_true", default=std.flip, help="mirror images at random; not for digits")
    crop = "crop a folder's images at random, to squares of at least this share of the shorter side; 0: to the middle"
    share = number(0, "in [0, 1]", below=math.nextafter(1, 2))
    add("--random-crop", type=share, default=std.random_crop, metavar="X", help=crop)
    add("--skip-corrupt", action="store_true", help="take the next image in place of one that can't be read")
    add("--workers", type=whole_number(0), default=std.workers, metavar="N", help="processes that read images ahead")

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=whole_number(1), default=std.steps, metavar="N", help="optimizer steps")
    add("--batch-size", type=whole_number(1), default=std.batch_size, metavar="N", help="images a step, of all ranks")
    parts = "parts that each rank divides its images into, to save memory; the weights are the same"
    add("--accumulate", type=whole_number(1), default=std.accumulate, metavar="N", help=parts)
    add("--lr", type=positive_number, default=std.lr, metavar="X", help="highest learning rate")
    falls = "falls to 0 at the last step by a cosine or a line, or stays"
    add("--lr-schedule", choices=tuple(LR_SCHEDULES), default=std.lr_schedule, help=falls)
    warmup = "steps until the learning rate is reached"
    add("--warmup", type=whole_number(0), default=std.warmup, metavar="N", help=warmup)
    add("--weight-decay", type=nonnegative_number, default=std.weight_decay, metavar="X", help="of AdamW")
    averages = "decays of AdamW's averages of the gradient and of its square"
    add("--betas", type=numbers, default=_text(std.betas), metavar="A,B", help=averages)
    eps = "what AdamW adds to the root of the latter"
    add("--adam-eps", type=nonnegative_number, default=std.adam_eps, metavar="X", help=eps)
    clip = "largest norm of the gradient; 0 for no limit"
    add("--clip", type=nonnegative_number, default=std.clip, metavar="X", help=clip)
    add("--ema", type=below_1, default=std.ema, metavar="X", help="decay of the weights' moving average")
    more = "decays of further moving averages, each written to FOLDER/ema-X"
    add("--extra-emas", type=numbers, default=argparse.SUPPRESS, metavar="A,B,...", help=more)
    add("--autocast", choices=AUTOCAST, default=std.autocast, help="lower precision of the model's arithmetic")
    again = "compute activations again in the backward pass, to save memory; the weights are the same"
    add("--gradient-checkpointing", action="store_true", help=again)
    add("--seed", type=seed, default=std.seed, metavar="N", help="of weights, order, timesteps, noise and dropout")
    add("--device", metavar="NAME", help=DEVICES_OF_RANKS)
    add("--graph", action="store_true", help="take each step by a CUDA graph; the weights are the same")

    add = parser.add_argument_group("model (diffusers' UNet2DModel)").add_argument
    add("--model-config", metavar="FILE", help="its config.json, in place of the next four options")
    widths = "channels, one number a level"
    add("--widths", type=whole_numbers, default=_text(std.widths), metavar="A,B,...", help=widths)
    add("--layers", type=whole_number(1), default=std.layers, metavar="N", help="residual blocks a level")
    attention = "levels that have attention"
    add("--attention", type=whole_numbers, default=_text(std.attention), metavar="I,...", help=attention)
    add("--groups", type=whole_number(1), default=std.groups, metavar="N", help="of the group norm")
    add("--dropout", type=below_1, default=std.dropout, metavar="X", help="in residual blocks")

    add = parser.add_argument_group("diffusion").add_argument
    add("--timesteps", type=steps, default=std.timesteps, metavar="N", help="steps of the schedule")
    growth = "how fast the noise grows"
    add("--beta-schedule", choices=tuple(SCHEDULES), default=std.beta_schedule, help=growth)
    add("--prediction", choices=SPACED_PREDICTIONS, default=std.prediction, help="what the model predicts")
    variance = "of a reverse step; a learned one is half of the model's output"
    add("--variance", choices=TRAINABLE_VARIANCES, default=std.variance, help=variance)

    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=(*LOSSES, *BOUNDS), default=std.loss, help="of the prediction's error")
    delta = "error up to which huber is quadratic"
    add("--delta", type=positive_number, default=std.delta, metavar="X", help=delta)
    weightings = ("simple", *WEIGHTINGS)
    add("--weighting", choices=weightings, default=std.weighting, help="how much each timestep counts")
    often = "how often each timestep is drawn"
    add("--timestep-sampler", choices=tuple(TIMESTEP_SAMPLERS), default=std.timestep_sampler, help=often)
    more = "mean of logit_normal; above 0 for more noise"
    add("--logit-mean", type=finite_number, default=std.logit_mean, metavar="X", help=more)
    spread = "standard deviation of logit_normal"
    add("--logit-std", type=positive_number, default=std.logit_std, metavar="X", help=spread)
    middle = "how much more often mode draws middle timesteps, -1 to 1.75"
    add("--mode-scale", type=finite_number, default=std.mode_scale, metavar="X", help=middle)
    bound = "weight of the variational bound beside the loss, for a learned variance"
    add("--vlb-weight", type=nonnegative_number, default=std.vlb_weight, metavar="X", help=bound)
    offset = "strength of noise that all pixels of a channel share"
    add("--offset-noise", type=nonnegative_number, default=std.offset_noise, metavar="X", help=offset)
    perturbation = "strength of further noise on the model's input only"
    add("--input-perturbation", type=nonnegative_number, default=std.input_perturbation, metavar="X", help=perturbation)

    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, metavar="FOLDER", help="for the model, checkpoints and losses (required)")
    resume = "continue the run in the folder, with its options where none are given"
    add("--resume", action="store_true", help=resume)
    between = "steps between two checkpoints"
    change = "with --resume: options given here may be others than those of the run, which --steps always may"
    add("--change", action="store_true", help=change)
    add("--checkpoint-every", type=whole_number(1), default=std.checkpoint_every, metavar="N", help=between)
    add("--keep", type=whole_number(1), default=std.keep, metavar="N", help="number of checkpoints to keep")
    add("--log-every", type=whole_number(1), default=std.log_every, metavar="N", help="steps between two lines")
    grids = "steps between two grids of samples; 0 for none"
    add("--sample-every", type=whole_number(0), default=std.sample_every, metavar="N", help=grids)
    add(
        "--sample-steps",
        type=whole_number(1),
        default=std.sample_steps,
        metavar="N",
        help="DDIM's steps for a grid or score",
    )
    add("--sample-count", type=whole_number(1), default=std.sample_count, metavar="N", help="samples in a grid")
    scored = "steps between two scores of samples, of which FOLDER/best keeps the best model; 0 for none"
    add("--score-every", type=whole_number(0), default=std.score_every, metavar="N", help=scored)
    add("--score-count", type=whole_number(2), default=std.score_count, metavar="N", help="samples for a score")
    features = "whose Fréchet distance to the training images is the score: pixels, or a function of your own"
    add("--features", default=std.features, metavar="pixels|MODULE:FUNCTION", help=features)
    events = "also write events for TensorBoard, to FOLDER/tensorboard"
    add("--tensorboard", action="store_true", help=events)
    tracked = "also log to this project of Weights & Biases, by its package wandb"
    add("--wandb", metavar="PROJECT", help=tracked)
    add("--weights-dtype", choices=tuple(DTYPES), default=std.weights_dtype, help="of the final model file")
    hub = "upload the model at the end to this repository of the Hugging Face Hub, by diffusers"
    add("--push-to-hub", metavar="REPO", help=hub)
    add("--hub-private", action="store_true", help="make that repository private, if it is new")
    add("--quiet", action="store_true", help="show no progress bar")


def _text(values: tuple[float, ...]) -> str:
    """As whole_numbers or numbers parses it, since the help shows the default."""
    return ",".join(map(str, values))
