"""The state of a training run: all tensors and numbers that a step changes and the next step uses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_ext.losses.timestep_samplers import make_timestep_sampler
from ddpm_ext.training import checkpoints, power_average
from ddpm_ext.training.options import SAMPLER_OPTIONS, TrainOptions
from ddpm_ext.training.score import Scores


class TrainState:
    """The state of a training run, such as the model, its moving averages, the optimizer and the number of steps taken.

    Raises:
        ValueError: the model has no parameters to train, or its state dict holds anything but tensors.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, device: torch.device) -> None:
        self.model = model
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                raise ValueError(f"model: {name} in its state dict is a {type(value).__name__}, expected a tensor")
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self.parameters:
            raise ValueError(f"model: a {type(model).__name__} has no parameters to train, expected at least one")
        # A CUDA graph reads the learning rate from a tensor. A Python number would keep its value at the capture.
        lr = torch.tensor(options.lr, dtype=torch.float32, device=device) if options.graph else options.lr
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=lr,
            betas=options.betas,
            eps=options.adam_eps,
            weight_decay=options.weight_decay,
            fused=True,
            capturable=options.graph,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.autocast == "float16")
        sampler_options = {name: getattr(options, name) for name in SAMPLER_OPTIONS.get(options.timestep_sampler, ())}
        self.timestep_sampler = make_timestep_sampler(options.timestep_sampler, options.timesteps, **sampler_options)
        self.step = 0
        self.scores = Scores(options)
        self.skipped: dict[str, None] = {}  # error messages of images that can't be read, in order, without duplicates
        self.extra = {decay: copy.deepcopy(self.average) for decay in options.extra_emas}  # further averages
        lengths = power_average.LENGTHS if options.snapshot_every else ()
        self.power = {length: copy.deepcopy(self.average) for length in lengths}  # power averages, for snapshots
        self._averaged_weights: dict[nn.Module, list[Tensor]] = {
            average: [average.get_parameter(name) for name in self.parameters]
            for average in (self.average, *self.extra.values(), *self.power.values())
        }
        self._weights: list[Tensor] = list(self.parameters.values())
        # {prefix of its tensors' names in a checkpoint: an object with a state dict of tensors}
        averages = {"average": self.average} | {f"average {decay}": average for decay, average in self.extra.items()}
        averages |= {f"average of length {length}": average for length, average in self.power.items()}
        self._parts: dict[str, Any] = {"model": model, **averages, "timestep_sampler": self.timestep_sampler}

    def set_learning_rate(self, rate: float) -> None:
        """Sets the learning rate, rounded to float32.

        With a CUDA graph, the learning rate is a float32 tensor. The rounding makes the weights the same without a
        graph.
        """
        rounded = torch.tensor(rate, dtype=torch.float32, device="cpu").item()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rounded)
            else:
                group["lr"] = rounded

    def changed_by_step(self) -> list[Tensor]:
        """The weights, buffers and optimizer's tensors: what a step changes before update_averages()."""
        slots = [value for slots_of_parameter in self.optimizer.state.values() for value in slots_of_parameter.values()]
        return [*self._weights, *self.model.buffers(), *(value for value in slots if isinstance(value, Tensor))]

    @torch.no_grad()
    def update_averages(self, decay: float) -> None:
        """Updates all averages of the weights after a step: average = decay * average + (1 - decay) * weights.

        The buffers of each average become copies of the model's buffers.

        decay: the decay of `average`. Each of the other averages has a decay of its own.
        """
        # In the first steps the decay is smaller, so that the initial weights soon stop mattering.
        early_decay = (1 + self.step) / (10 + self.step)
        decays = [(min(decay, early_decay), average) for decay, average in ((decay, self.average), *self.extra.items())]
        decays += [(power_average.decay(length, self.step + 1), average) for length, average in self.power.items()]
        for average_decay, average in decays:
            torch._foreach_lerp_(self._averaged_weights[average], self._weights, 1 - average_decay)
            for value, current in zip(average.buffers(), self.model.buffers(), strict=True):
                value.copy_(current)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, by name."""
        tensors: dict[str, Tensor] = {}
        for prefix, part in self._parts.items():
            tensors |= {f"{prefix}.{name}": value for name, value in part.state_dict().items()}
        names = list(self.parameters)
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{slot}.{names[index]}": value for slot, value in slots.items()}
        return tensors

    def numbers(self) -> dict[str, Any]:
        """The part of the state that is not in tensors(), as JSON."""
        return {
            "step": self.step,
            "scaler": self.scaler.state_dict(),
            "skipped": list(self.skipped),
            "scores": self.scores.state(),
        }

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any], path: Path) -> None:
        """Sets the state to what tensors() and numbers() returned, read from the file at `path`.

        Raises:
            ValueError: the file has the state of another model, or weights that are not finite. The message names the
                file.
        """
        try:
            for prefix, part in self._parts.items():
                part.load_state_dict(checkpoints.with_prefix(tensors, f"{prefix}."))
            optimizer = self.optimizer.state_dict()
            optimizer["state"] = self._slots(checkpoints.with_prefix(tensors, "optimizer."))
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(numbers["scaler"])
            self.scores.restore(numbers["scores"])
            self.step, self.skipped = int(numbers["step"]), dict.fromkeys(numbers["skipped"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"resume: {path} holds the state of another model") from error
        for name, value in tensors.items():
            if name.startswith(("model.", "average")) and not value.isfinite().all():
                raise ValueError(f"resume: {path} holds values of {name} that are not finite numbers")

    def _slots(self, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state, {index of a parameter: {slot: tensor}}. A slot is a name such as "exp_avg".

        tensors: {"slot.parameter": tensor}, for example with the key "exp_avg.conv.weight".
        """
        index_of = {name: index for index, name in enumerate(self.parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            slot, _, parameter = name.partition(".")
            index = index_of[parameter]
            if value.dim():  # AdamW's fused step assumes that its state has the parameter's strides
                value = torch.empty_like(self._weights[index]).copy_(value)
            state.setdefault(index, {})[slot] = value
        return state
