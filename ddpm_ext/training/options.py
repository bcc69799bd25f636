"""The options of a training run, and checks that a checkpoint or the ranks of a run have the same options."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_ext.base import checks
from ddpm_ext.losses.timestep_samplers import TIMESTEP_SAMPLERS, Mode
from ddpm_ext.ops.loss_kinds import BOUNDS, LOSSES
from ddpm_ext.tables.variances import TRAINABLE_VARIANCES, VARIANCES
from ddpm_ext.tables.weightings import WEIGHTINGS
from ddpm_ext.tuning.teacher import STEPS
from ddpm_ext.version import default_device

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AUTOCAST = ("none", "bfloat16", "float16")
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""{name: a function of the share of steps done, which returns the learning rate as a share of its maximum}"""
SAMPLER_OPTIONS = {"logit_normal": ("logit_mean", "logit_std"), "mode": ("mode_scale",)}
"""{name of a timestep sampler: the options that only it has}"""

# The options that may change when a run is resumed. Of these, only `steps`, and `accumulate` and `device`, which change
# dropout and the rounding of sums, affect the weights. Options that name the data and the model are here, since a
# resume compares the data and the model themselves.
_MAY_CHANGE = frozenset[str]().union(
    ("steps", "data", "image_size", "channels", "skip_corrupt", "workers", "model_config"),
    ("accumulate", "device", "graph", "gradient_checkpointing", "checkpoint_every", "keep", "log_every"),
    ("sample_every", "sample_steps", "sample_count", "score_every", "score_count", "features"),
    ("tune", "tensorboard", "wandb", "weights_dtype", "push_to_hub", "hub_private"),
)
CHANGEABLE = (
    *("lr", "lr_schedule", "warmup", "weight_decay", "betas", "adam_eps", "clip", "ema", "batch_size", "flip"),
    *("random_crop", "loss", "delta", "weighting", "vlb_weight", "offset_noise", "input_perturbation"),
)
"""Options that affect the weights. A resume may change them if the caller lists them in `change`."""
_MINIMUMS = (  # (smallest allowed value, options)
    (0, ("warmup", "workers", "snapshot_every", "sample_every", "score_every")),
    (1, ("steps", "batch_size", "accumulate", "layers", "head_channels", "groups", "timesteps")),
    (1, ("checkpoint_every", "log_every", "keep", "sample_steps", "sample_count")),
    (2, ("score_count",)),
)
_SMALLEST_POSITIVE = math.ulp(0)
LIMITS: dict[str, tuple[float, float, str]] = {
    **{name: (low, math.inf, f"at least {low}") for low, names in _MINIMUMS for name in names},
    **dict.fromkeys(("lr", "delta", "logit_std"), (_SMALLEST_POSITIVE, math.inf, "a number > 0")),
    **dict.fromkeys(("weight_decay", "adam_eps", "clip", "vlb_weight"), (0, math.inf, "a number >= 0")),
    **dict.fromkeys(("offset_noise", "input_perturbation"), (0, math.inf, "a number >= 0")),
    **dict.fromkeys(("ema", "dropout", "class_dropout"), (0, 1, "in [0, 1)")),
    "random_crop": (0, math.nextafter(1, 2), "in [0, 1]"),
    "logit_mean": (-sys.float_info.max, math.inf, "a finite number"),
    "mode_scale": (-1, math.nextafter(Mode.LARGEST, 2), "in [-1, 2 / (pi - 2)]"),
    "seed": (0, 2**64, "in [0, 2^64)"),
}
"""{option that is a number: (smallest allowed value, exclusive upper bound, the range in words)}"""
CHOICES: dict[str, tuple[str, ...]] = {
    "autocast": AUTOCAST,
    "loss": (*LOSSES, *BOUNDS),
    "lr_schedule": tuple(LR_SCHEDULES),
    "timestep_sampler": tuple(TIMESTEP_SAMPLERS),
    "variance": TRAINABLE_VARIANCES,
    "weighting": ("simple", *WEIGHTINGS),
    "weights_dtype": tuple(DTYPES),
}
"""{option that is one of several names: the names}"""


def _as_bool(name: str, value: Any) -> bool:
    """Converts True, False, 0 and 1 to a bool. Raises TypeError, naming the option, for any other value."""
    if not isinstance(value, (int, np.bool_)) or value not in (0, 1):
        raise TypeError(f"{name} is {value!r}, expected a bool")
    return bool(value)


def _tuple_of(parse: Callable[[str, Any], float]) -> Callable[[str, Any], tuple[float, ...]]:
    """Returns a function that converts the items of an option's value with `parse` and returns them as a tuple."""

    def check_items(name: str, values: Any) -> tuple[float, ...]:
        try:
            items = tuple(values)
        except TypeError:
            raise TypeError(f"{name} is {values!r}, expected a tuple of numbers") from None
        return tuple(parse(f"{name}[{i}]", value) for i, value in enumerate(items))

    return check_items


# {option type: a function that checks a value and converts numpy's types, which JSON rejects, to Python's}
_TO_PYTHON: dict[Any, Callable[[str, Any], Any]] = {
    "bool": _as_bool,
    "int": checks.as_int,
    "int | None": lambda name, value: value if value is None else checks.as_int(name, value),
    "float": checks.real,
    "tuple[int, ...]": _tuple_of(checks.as_int),
    **dict.fromkeys(("tuple[float, ...]", "tuple[float, float]"), _tuple_of(checks.real)),
}


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training run; `ddpm-ext train --help` explains each of them.

    Raises:
        TypeError, ValueError: an option has a wrong type, is out of range, or conflicts with another option. The
            message names the option.

    Examples:
        >>> from ddpm_ext.training import TrainOptions
        >>> options = TrainOptions(data="shapes", classes=True, steps=20_000, batch_size=64, lr_schedule="cosine")
    """

    data: str = "digits"
    image_size: int | None = None
    channels: int | None = None
    classes: bool = False
    class_dropout: float = 0.1
    flip: bool = False
    random_crop: float = 0.0
    skip_corrupt: bool = False
    workers: int = 0
    steps: int = 5000
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 2e-3
    lr_schedule: str = "cosine"
    warmup: int = 300
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    clip: float = 1.0
    ema: float = 0.999
    extra_emas: tuple[float, ...] = ()
    snapshot_every: int = 0
    autocast: str = "none"
    gradient_checkpointing: bool = False
    seed: int = 0
    model_config: str | None = None
    widths: tuple[int, ...] = (32, 48, 64)
    layers: int = 1
    attention: tuple[int, ...] = (1,)
    head_channels: int = 8
    groups: int = 8
    dropout: float = 0.1
    timesteps: int = 1000
    beta_schedule: str = "linear"
    prediction: str = "eps"
    variance: str = "fixed_small"
    loss: str = "mse"
    delta: float = 1.0
    weighting: str = "simple"
    vlb_weight: float = 0.001
    timestep_sampler: str = "low_discrepancy"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    checkpoint_every: int = 500
    log_every: int = 100
    keep: int = 2
    sample_every: int = 0
    sample_steps: int = 50
    sample_count: int = 16
    score_every: int = 0
    score_count: int = 256
    features: str = "pixels"
    tune: tuple[int, ...] = ()
    tensorboard: bool = False
    wandb: str | None = None
    device: str = field(default_factory=default_device)
    graph: bool = False
    weights_dtype: str = "float32"
    push_to_hub: str | None = None
    hub_private: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", default_device() if self.device is None else str(self.device))
        checks.device(self.device)
        for option in fields(self):
            value = getattr(self, option.name)
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            if (check := _TO_PYTHON.get(option.type)) is not None:
                value = check(option.name, value)
            object.__setattr__(self, option.name, value)
        for name, (low, below, expected) in LIMITS.items():
            _require(name, getattr(self, name), low <= getattr(self, name) < below, expected)
        for name, choices in CHOICES.items():
            _require(name, getattr(self, name), getattr(self, name) in choices, "one of " + ", ".join(choices))
        valid = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require("betas", self.betas, valid, "two numbers in [0, 1)")
        valid = all(0 <= decay < 1 for decay in self.extra_emas) and len({*self.extra_emas}) == len(self.extra_emas)
        _require("extra_emas", self.extra_emas, valid, "different numbers in [0, 1)")
        _require("widths", self.widths, bool(self.widths) and min(self.widths) >= 1, "one positive number a level")
        for width in self.widths:
            _require("widths", width, width % self.groups == 0, f"multiples of groups, {self.groups}")
        for level in self.attention:
            _require("attention", level, 0 <= level < len(self.widths), f"levels in [0, {len(self.widths)})")
        if self.batch_size < self.accumulate:
            raise ValueError(f"accumulate: got {self.accumulate}, expected at most the batch size, {self.batch_size}")
        if (self.sample_every or self.score_every) and self.sample_steps > self.timesteps:
            raise ValueError(f"sample_steps: got {self.sample_steps}, expected at most {self.timesteps}, the timesteps")
        valid = all(1 <= calls <= self.timesteps for calls in self.tune) and (not self.tune or self.timesteps >= STEPS)
        _require("tune", self.tune, valid, f"numbers from 1 to the timesteps, and at least {STEPS} timesteps")
        if self.tune and VARIANCES[self.variance].learned:
            raise ValueError(f"tune: got variance {self.variance}, expected a fixed one")
        if self.graph and self.accumulate > 1:
            raise ValueError(f"graph: got accumulate {self.accumulate}, expected 1")
        if self.graph and self.autocast == "float16":
            raise ValueError("graph: got autocast float16, whose loss scale the host sets, expected another")
        if self.graph and self.gradient_checkpointing:
            raise ValueError("graph: got gradient_checkpointing, which reads random states, expected one of the two")
        if self.hub_private and not self.push_to_hub:
            raise ValueError("hub_private: got no push_to_hub, expected the repository's name")
        if self.flip and self.data == "digits":
            raise ValueError("flip: digits are not to be mirrored")


def check_same(now: dict[str, Any], then: dict[str, Any], folder: Path, change: Collection[str] = ()) -> None:
    """Raises ValueError, naming the first difference, if a resumed run has other options or inputs than at its start.

    now: the options and inputs of the resume.
    then: the options and inputs with which the run in `folder` was last started. A missing option counts as its
        default: the run was started by an older version, which did what the default does.
    change: the names of options that may differ.
    """
    now, then = json.loads(json.dumps(now)), with_new_defaults(then)
    for name in {**now, **then}:
        if name not in _MAY_CHANGE and name not in change and now.get(name) != then.get(name):
            allowed = f"; --change, or change={[name]}, allows it" if name in CHANGEABLE else ""
            was = f"the run in {folder} has {then.get(name)}"
            raise ValueError(f"resume: {name} is {now.get(name)}, but {was}{allowed}")


def check_same_on_ranks(rank_inputs: list[dict[str, Any]]) -> None:
    """Raises ValueError unless all ranks have the same options, data and model. The device may differ.

    rank_inputs: for each rank, its options and the other inputs on which weights depend.
    """
    for rank, inputs in enumerate(rank_inputs):
        for name, value in {**rank_inputs[0], **inputs}.items():
            if name != "device" and (inputs.get(name), rank_inputs[0].get(name)) != (value, value):
                raise ValueError(
                    f"ranks: {name} is {inputs.get(name)} on rank {rank} and {rank_inputs[0].get(name)} on rank 0, "
                    "expected the same on all"
                )


def with_new_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """The options in a run's files, and the defaults of options that did not exist when the run was started."""
    return as_json(TrainOptions()) | stored


def as_json(options: TrainOptions) -> dict[str, Any]:
    """The options as JSON has them in a run's files: a tuple is a list."""
    return json.loads(json.dumps(asdict(options)))


def with_defaults_of(stored: dict[str, Any], changes: dict[str, Any]) -> TrainOptions:
    """The options in a checkpoint, `stored`, with those in `changes` in their place. Options in neither have defaults.

    Names in `stored` that are no options, as in a checkpoint of another version, are ignored.
    """
    current = {name: value for name, value in stored.items() if name in TrainOptions.__dataclass_fields__}
    return TrainOptions(**current | changes)


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    """Raises ValueError, with the option's name and value and the expected values, unless `valid`."""
    if not valid:
        raise ValueError(f"{name}: got {value}, expected {expected}")
