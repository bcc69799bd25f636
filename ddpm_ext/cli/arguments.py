"""The options of `ddpm-ext`: their names, ranges, defaults and help."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ddpm_ext.bulk.run import SHARD_SIZE
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA

__all__ = ["build_parser", "given_to_train"]

_WRONG_USAGE = 2


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each help text, but not "(default: None)"; examples keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2  # argparse forgets that commands are indented, and wraps the longest one

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False or action.required
        return action.help if bare else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(_WRONG_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`."""
    expected = f"a whole number of at least {low}" if high is None else f"a whole number in [{low}, {high}]"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"got {text}, expected {expected}")
        return value

    return parse


def _number(low: float, expected: str, *, above: bool = False, below: float = math.inf) -> Callable[[str], float]:
    """A parser of finite numbers from `low` (or above it) to below `below`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value < below:  # also for NaN
            raise argparse.ArgumentTypeError(f"got {text}, expected {expected}")
        return value

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them; none for an empty text."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text}, expected whole numbers with commas between them") from None


_SEED = _whole(0, 2**64 - 1)
_DEVICES = ("cpu, cuda, cuda:1, ...", "cpu, cuda, cuda:1, ...; with several ranks, cuda is a GPU for each")
_DTYPES = ("float32", "float16", "bfloat16")


def _add_sampling(
    parser: argparse.ArgumentParser, *, num: int, many: bool, out: str | None, out_help: str
) -> Callable[..., argparse.Action]:
    """The options of drawing samples, by ranks and in batches if `many`; returns what adds to the group of output."""
    group = parser.add_argument_group("what to sample")
    add = group.add_argument
    add(
        "--model",
        default="digits",
        metavar="digits|FOLDER",
        help="the one that ships, or a folder in diffusers' layout",
    )
    counts = group.add_mutually_exclusive_group()
    counts.add_argument("--num", type=_whole(1), default=num, metavar="N", help="how many samples")
    if many:
        counts.add_argument(
            "--num-images",
            type=_whole(1),
            metavar="N",
            help="how many into a folder, by all ranks of torchrun; if killed, the same command again goes on",
        )
    add("--seed", type=_SEED, default=0, metavar="N", help="what the noise follows from, with each sample's number")
    add = parser.add_argument_group("how to sample").add_argument
    add("--sampler", choices=tuple(SAMPLERS), default="ddpm", help="the reverse step")
    add("--steps", type=_whole(1), metavar="N", help="steps of the loop (default: as many as the model has)")
    add(
        "--spacing",
        default="linspace",
        metavar="HOW",
        help="which of the timesteps: linspace, leading, trailing, quadratic, ddim25 or 10,15,20 and the like; "
        "or between them: karras, log_snr",
    )
    with_eta = " or ".join(WITH_ETA)
    add("--eta", type=_number(0, "a number >= 0"), metavar="X", help=f"share of noise in a step of {with_eta}")
    add = parser.add_argument_group("how to run").add_argument
    add("--device", default="cpu", metavar="NAME", help=_DEVICES[many])
    add("--dtype", choices=_DTYPES, default="float32", help="of model and samples")
    add("--backend", choices=("fused", "reference"), default="fused", help="our kernels, or plain torch")
    if many:
        add("--batch-size", type=_whole(1), default=64, metavar="N", help="samples at a time, on each rank")
    add("--quiet", action="store_true", help="no progress bar")
    add = parser.add_argument_group("output").add_argument
    add("--out", default=out, metavar="FILE|FOLDER" if many else "FILE", help=out_help)
    return add


def _add_train(parser: argparse.ArgumentParser) -> None:
    """The options of `train`; their names are those of TrainOptions."""
    from ddpm_ext.losses.timestep_samplers import TIMESTEP_SAMPLERS
    from ddpm_ext.ops.loss_kinds import BOUNDS, LOSSES
    from ddpm_ext.tables.variances import TRAINABLE_VARIANCES
    from ddpm_ext.tables.weightings import WEIGHTINGS
    from ddpm_ext.training.options import AUTOCAST, TrainOptions

    std = TrainOptions()
    add = parser.add_argument_group("data").add_argument
    add("--data", default=std.data, metavar="digits|FOLDER", help="scikit-learn's handwritten digits, or your images")
    add("--image-size", type=_whole(1), metavar="N", help="images are cropped to a square and resized to N by N")
    add("--channels", type=int, choices=(1, 3), help="grey or colour (default: 1 for digits, 3 for a folder)")
    add("--flip", action="store_true", default=std.flip, help="mirror images at random; not for digits")
    add("--skip-corrupt", action="store_true", help="take the next image in place of one that can't be read")
    add("--workers", type=_whole(0), default=std.workers, metavar="N", help="processes that read images ahead")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=_whole(1), default=std.steps, metavar="N", help="optimizer steps")
    add("--batch-size", type=_whole(1), default=std.batch_size, metavar="N", help="images a step, of all ranks")
    parts = "parts that a rank takes its images in, one after the other: less memory, the same weights"
    add("--accumulate", type=_whole(1), default=std.accumulate, metavar="N", help=parts)
    add("--lr", type=_number(0, "a number > 0", above=True), default=std.lr, metavar="X", help="highest learning rate")
    add("--warmup", type=_whole(0), default=std.warmup, metavar="N", help="steps up to it; a cosine leads down to 0")
    add("--weight-decay", type=_number(0, "a number >= 0"), default=std.weight_decay, metavar="X", help="AdamW's")
    add("--clip", type=_number(0, "a number >= 0"), default=std.clip, metavar="X", help="largest gradient norm; 0: any")
    add("--ema", type=_number(0, "in [0, 1)", below=1), default=std.ema, metavar="X", help="decay of the average kept")
    add("--autocast", choices=AUTOCAST, default=std.autocast, help="lower precision of the model's arithmetic")
    add("--seed", type=_SEED, default=std.seed, metavar="N", help="of weights, order, timesteps, noise and dropout")
    add("--device", default=std.device, metavar="NAME", help=_DEVICES[True])
    add = parser.add_argument_group("model (diffusers' UNet2DModel)").add_argument
    add("--model-config", metavar="FILE", help="its config.json, in place of the next four")
    add("--widths", type=_numbers, default=_text(std.widths), metavar="A,B,...", help="channels, one number a level")
    add("--layers", type=_whole(1), default=std.layers, metavar="N", help="residual blocks a level")
    add("--attention", type=_numbers, default=_text(std.attention), metavar="I,...", help="levels that have attention")
    add("--groups", type=_whole(1), default=std.groups, metavar="N", help="of the group norm")
    add("--dropout", type=_number(0, "in [0, 1)", below=1), default=std.dropout, metavar="X", help="in residual blocks")
    add = parser.add_argument_group("diffusion").add_argument
    add("--timesteps", type=_whole(1), default=std.timesteps, metavar="N", help="steps of the schedule")
    add("--beta-schedule", choices=_SCHEDULES, default=std.beta_schedule, help="how fast the noise grows")
    add("--prediction", choices=("eps", "x0", "v"), default=std.prediction, help="what the model predicts")
    learned = "of a step; a learned one is half of the model's output"
    add("--variance", choices=TRAINABLE_VARIANCES, default=std.variance, help=learned)
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=(*LOSSES, *BOUNDS), default=std.loss, help="of the prediction's difference")
    positive = _number(0, "a number > 0", above=True)
    add("--delta", type=positive, default=std.delta, metavar="X", help="up to where huber is square")
    weightings = ("simple", *WEIGHTINGS)
    add("--weighting", choices=weightings, default=std.weighting, help="how much each timestep counts")
    add("--timestep-sampler", choices=tuple(TIMESTEP_SAMPLERS), default=std.timestep_sampler, help="how often it comes")
    share = _number(0, "a number >= 0")
    bound = "of the variational bound beside the loss, for a learned variance"
    add("--vlb-weight", type=share, default=std.vlb_weight, metavar="X", help=bound)
    offsets = "strength of noise that all pixels of a channel share"
    add("--offset-noise", type=share, default=std.offset_noise, metavar="X", help=offsets)
    inputs = "strength of noise on the model's input alone"
    add("--input-perturbation", type=share, default=std.input_perturbation, metavar="X", help=inputs)
    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, metavar="FOLDER", help="model, checkpoints and losses go there (required)")
    add("--resume", action="store_true", help="go on from the newest checkpoint, with its options where none are given")
    add("--checkpoint-every", type=_whole(1), default=std.checkpoint_every, metavar="N", help="steps between two")
    add("--keep", type=_whole(1), default=std.keep, metavar="N", help="how many checkpoints stay")
    add("--log-every", type=_whole(1), default=std.log_every, metavar="N", help="steps between two lines")
    add("--sample-every", type=_whole(0), default=std.sample_every, metavar="N", help="steps between grids; 0: none")
    add("--sample-steps", type=_whole(1), default=std.sample_steps, metavar="N", help="of DDIM, for a grid")
    add("--sample-count", type=_whole(1), default=std.sample_count, metavar="N", help="samples in a grid")
    add("--tensorboard", action="store_true", help="events for TensorBoard, too, in FOLDER/tensorboard")
    add("--weights-dtype", choices=_DTYPES, default=std.weights_dtype, help="of the final model file")
    add("--quiet", action="store_true", help="no progress bar")


_SCHEDULES = ("linear", "cosine", "scaled_linear", "sigmoid")

_EXAMPLES = {
    "sample": """
  ddpm-ext sample --num 64 --out digits.png
  ddpm-ext sample --model my-run --sampler ddim --steps 50 --spacing trailing --seed 7 --out mine.png
  ddpm-ext sample --num-images 50000 --device cuda --out samples --npz
  torchrun --nproc-per-node 8 -m ddpm_ext sample --num-images 50000 --device cuda --out samples --npz""",
    "train": """
  ddpm-ext train --out my-digits
  ddpm-ext train --data photos --image-size 32 --flip --widths 64,128,256 --groups 32 --device cuda --out my-run
  ddpm-ext train --out my-run --resume
  torchrun --nproc-per-node 8 -m ddpm_ext train --data photos --image-size 64 --device cuda --out my-run""",
    "trajectory": """
  ddpm-ext trajectory --num 5 --every 100 --out trajectory.png
  ddpm-ext trajectory --num 16 --sampler ddim --steps 50 --out trajectory.gif""",
}


def _text(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def build_parser() -> argparse.ArgumentParser:
    """The parser of `ddpm-ext` with its five commands."""
    from ddpm_ext import __version__
    from ddpm_ext.cli.plot import add_parser as add_plot

    parser: argparse.ArgumentParser = _Parser(
        prog="ddpm-ext",
        usage="ddpm-ext COMMAND [options]",
        description="Diffusion with one kernel launch a step, and the same noise for the same seed everywhere.",
        epilog="ddpm-ext COMMAND --help tells more.",
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"ddpm-ext {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def add(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        examples = f"examples:{_EXAMPLES[name]}" if name in _EXAMPLES else None
        usage = f"ddpm-ext {name} [options]"
        made = commands.add_parser(
            name, usage=usage, help=summary, description=text, epilog=examples, formatter_class=_Formatter
        )
        made.prog = f"ddpm-ext {name}"
        return made

    sample = add("sample", "draw samples into an .npz, a picture or a folder", "Draws samples from a model.")
    kinds = (
        "with --num .npz: arr_0, uint8, (num, height, width, channels), as guided-diffusion's scripts write it, or "
        ".png: a grid (default: samples.npz); with --num-images a folder (default: samples)"
    )
    add_output = _add_sampling(sample, num=256, many=True, out=None, out_help=kinds)
    add_output(
        "--npz",
        nargs="?",
        const="",
        metavar="FILE",
        help="with --num-images: an .npz, too (default: FOLDER/samples_NxHxWxC.npz), for guided-diffusion's evaluator",
    )
    pngs = "with --num-images: FOLDER/png/000000.png and so on, too, for torch-fidelity"
    add_output("--png", action="store_true", help=pngs)
    shards = "with --num-images: samples in each file; a batch has no more"
    add_output("--shard-size", type=_whole(1), default=SHARD_SIZE, metavar="N", help=shards)
    _add_train(add("train", "train a model", "Trains a denoiser; it may be killed at any time and resumed."))
    strips = add(
        "trajectory",
        "draw how samples come about",
        "Draws x_t and the predicted x_0 at the same steps of the loop, for the first samples of the seed.",
    )
    kinds = ".png: two strips; .gif: x_t and the predicted x_0 side by side, moving"
    _add_sampling(strips, num=8, many=False, out="trajectory.png", out_help=kinds)
    add_option = strips.add_argument_group("strips").add_argument
    add_option(
        "--every",
        type=_whole(1),
        metavar="K",
        help="steps between two pictures (default: about ten in all, 60 in a GIF)",
    )
    add_plot(commands)
    add("info", "show build, devices and instruction set", "Shows how the extension was built and what it runs on.")
    return parser


def given_to_train(arguments: Sequence[str]) -> dict[str, Any]:
    """What the command line says after `train`, without the defaults of what it doesn't say."""
    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for action in commands.choices["train"]._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(arguments))
