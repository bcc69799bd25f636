"""Adds the options that several commands share: the model and its classes, the loop, the device, and the output."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from ddpm_ext.cli import arguments
from ddpm_ext.cli.chosen_tables import DEFAULT, TUNED
from ddpm_ext.cli.loop_inputs import add_clip, add_images
from ddpm_ext.process.process import BACKENDS
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.training.options import DTYPES


def add_model(group: Any, default: str = "digits") -> None:
    models = "a model that comes with the package, a folder in diffusers' layout, or that of a training run"
    group.add_argument("--model", default=default, metavar="digits|shapes|FOLDER", help=models)
    add_network(group)


def add_network(group: Any) -> None:
    network = "for a run of a module that is no UNet2DModel: the class or function, without arguments, that makes one"
    group.add_argument("--network", metavar="MODULE:NAME", help=network)


def add_seed(group: Any) -> None:
    determines = "determines the noise, together with the number of each sample"
    group.add_argument("--seed", type=arguments.seed, default=0, metavar="N", help=determines)


def add_class(group: Any, default: str) -> None:
    """Adds --class. default: a description of the default, for the help."""
    classes = f"classes that the samples have in turn, by name or number, with commas between them (default: {default})"
    group.add_argument("--class", dest="classes", metavar="NAME,...", help=classes)


def add_null_class(group: Any) -> None:
    null = "class for samples without a class, which guidance needs (default: that of a model trained here)"
    group.add_argument("--null-class", type=arguments.whole_number(0), metavar="N", help=null)


def add_spacing(group: Any, default: str = "all timesteps of the model") -> None:
    """Adds --steps and --spacing. default: a description of the default of --steps, for the help."""
    count = f"steps of the loop (default: {default})"
    group.add_argument("--steps", type=arguments.steps, metavar="N", help=count)
    group.add_argument("--spacing", action=arguments.SpacingName, metavar="HOW", help=arguments.SPACING)


def add_running(
    parser: Any,
    *,
    batches: str | None,
    by_ranks: bool = False,
    loop: bool = True,
    capture: bool = True,
    dtype: bool = True,
) -> None:
    """Adds the group of options "how to run": the device, the dtype, how the model is called, and the batch size.

    Args:
        batches: a description of a batch, for the help. None for a command that draws all samples at once. It gets no
            --batch-size, and neither --compile nor --graph, since such commands record x_t when the loop calls the
            model (trajectory, plot histogram), or change the guidance from loop to loop (plot guidance).
        by_ranks: whether several ranks can run the command.
        loop: whether the command runs a sampling loop.
        capture: whether the model can be compiled, and the loop's steps captured as a CUDA graph.
        dtype: whether dtypes other than float32 can be chosen.
    """
    parser.set_defaults(dtype="float32")
    add = parser.add_argument_group("how to run").add_argument
    add("--device", metavar="NAME", help=arguments.DEVICES_OF_RANKS if by_ranks else arguments.DEVICES)
    if dtype:
        add("--dtype", choices=tuple(DTYPES), default="float32", help="of the model and the samples")
    add("--backend", choices=tuple(BACKENDS), default="fused", help="the compiled kernels, or plain torch")
    if loop:
        add("--autocast", choices=("bfloat16", "float16"), help="lower precision of the model's arithmetic")
        weights = "keep the model's weights in channels_last, for convolutions on a GPU"
        add("--channels-last", action="store_true", help=weights)
    if loop and capture and batches is not None:
        modes = "compile the model by torch.compile, or by this mode of it"
        add("--compile", nargs="?", const=True, default=False, metavar="MODE", help=modes)
        graphs = "take each step, or all of them, by a CUDA graph"
        add("--graph", nargs="?", const="step", default=False, choices=("step", "loop"), help=graphs)
    if batches is not None:
        add("--batch-size", type=arguments.whole_number(1), default=64, metavar="N", help=batches)
    add("--quiet", action="store_true", help="show no progress bar")


def add_sampling(
    parser: argparse.ArgumentParser,
    *,
    num: int,
    out: str | None,
    out_help: str,
    by_ranks: bool = False,
    model: str = "digits",
    scales: str | None = None,
) -> Callable[..., argparse.Action]:
    """Adds the options of all commands that draw samples.

    Args:
        num: the default number of samples.
        out, out_help: the default of --out and its help text.
        by_ranks: whether the command can also draw many images in batches, by several ranks.
        model: the default of --model.
        scales: the default of --guidance if it takes several numbers, or None if it takes one number.

    Returns:
        The function that adds a further option to the group of output options.
    """
    parser.set_defaults(default_num=num)
    group = parser.add_argument_group("what to sample")
    add_model(group, model)
    counts = group.add_mutually_exclusive_group()
    number = f"number of samples (default: {num}, or one for each image of the options below)"
    counts.add_argument("--num", type=arguments.samples, metavar="N", help=number)
    if by_ranks:
        into_folder = (
            "number of samples to draw into a folder, by all ranks of torchrun; if the run is killed, the same "
            "command continues it, and a larger number adds to a folder"
        )
        counts.add_argument("--num-images", type=arguments.samples, metavar="N", help=into_folder)
    add_seed(group)
    add_class(group, "all")

    group = parser.add_argument_group("how to sample")
    add = group.add_argument
    scale = "scale of classifier-free guidance: 1 for none, and further towards the class above 1"
    if scales is None:
        add("--guidance", type=arguments.finite_number, metavar="X", help=scale)
    else:
        add("--guidance", type=arguments.numbers, default=scales, metavar="X,...", help=f"{scale}; several")
    rescale = "how much of guidance's growth of the output's standard deviation to undo, 0 to 1; 0.7 is usual"
    add("--guidance-rescale", type=arguments.finite_number, metavar="X", help=rescale)
    interval = "the timesteps at which to guide, both included (default: all)"
    add("--guidance-interval", type=arguments.finite_number, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    add_null_class(group)
    alternatives = group.add_mutually_exclusive_group()
    samplers = (
        f"the reverse step: {arguments.LISTED}; or {TUNED}: the model's own table for --steps, of ddpm-ext tune "
        f"(default: {DEFAULT})"
    )
    names: dict[str, Any] = {"action": arguments.SamplerName, "known": (*SAMPLERS, TUNED)}
    alternatives.add_argument("--sampler", **names, metavar="NAME", help=samplers)
    table = "the rows of a .json file that StepTable.save wrote, as ddpm-ext tune and ddpm-ext table --save do"
    alternatives.add_argument("--table", metavar="FILE", help=table)
    add_spacing(group, "with --sampler all timesteps of the model")
    eta = "scale of the noise, for samplers that ddpm-ext samplers marks with eta"
    add("--eta", type=arguments.nonnegative_number, metavar="X", help=eta)
    add_clip(group)
    add_images(parser)

    add_running(parser, batches="samples at a time, on each rank" if by_ranks else None, by_ranks=by_ranks)
    add = parser.add_argument_group("output").add_argument
    add("--out", default=out, metavar="FILE|FOLDER" if by_ranks else "FILE", help=out_help)
    return add
