"""One training step, by a process alone or by each of several; its numbers stay on the device until they are asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddpm_ext.base.ranks import Ranks
from ddpm_ext.base.seeds import seed_for
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.ops.noise import Philox
from ddpm_ext.training.log import Row
from ddpm_ext.training.options import DTYPES, TrainOptions
from ddpm_ext.training.state import TrainState

__all__ = ["Stepper", "learning_rate", "loss_options"]

_SHOWN = 8  # timesteps of a loss that is no number
_LEAST_SCALE = 1.0  # of a float16 loss: what overflows below it is the model's own


class _Pending(NamedTuple):
    """A step's numbers, on the device."""

    step: int
    t: Tensor
    losses: Tensor
    norm: Tensor


class Stepper:
    """Takes steps on a TrainState.

    Sample i of the batch of step s has id i and draw s (stream 2), whatever rank has it, and its timestep follows from
    seed, s and i: so any number of ranks, or of parts to accumulate, sees the same.
    """

    def __init__(
        self,
        state: TrainState,
        diffusion: GaussianDiffusion,
        options: TrainOptions,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.state, self.diffusion, self.options, self.ranks, self.device = state, diffusion, options, ranks, device
        self.rows = _share(range(options.batch_size), ranks.rank, ranks.size)
        self.parts = [_share(self.rows, part, options.accumulate) for part in range(options.accumulate)]
        self.parallel = ranks.parallel(state.model, device)
        self._rehearsed = ranks.size == 1
        self._pending: list[_Pending] = []

    def take(self, images: Tensor) -> None:
        """Takes the step that comes next. `images`: this rank's rows, (rows, channels, height, width)."""
        state, options, step = self.state, self.options, self.state.step
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        timesteps = state.timestep_sampler.sample(
            len(self.rows), seed=options.seed, iteration=step, first=self.rows.start, total=options.batch_size
        )
        x_start, t, weights = map(self._on_device, (images, *timesteps))
        if not self._rehearsed:
            self._rehearse(x_start, t, weights)
        state.optimizer.zero_grad(set_to_none=True)
        losses = torch.cat([self._backward(part, x_start, t, weights) for part in self.parts])
        norm = self._update()
        if state.timestep_sampler.learns:
            # Waits for the device, and for all ranks.
            seen, found = zip(*self.ranks.gather((timesteps[0], losses.cpu())), strict=True)
            state.timestep_sampler.update(torch.cat(seen), torch.cat(found), local=False)
        self._pending.append(_Pending(step, t, losses * weights, norm))
        state.step += 1

    def _on_device(self, value: Tensor) -> Tensor:
        """A copy that is not waited for; on a GPU that takes pinned memory."""
        return (value.pin_memory() if self.device.type == "cuda" else value).to(self.device, non_blocking=True)

    def _rehearse(self, x_start: Tensor, t: Tensor, weights: Tensor) -> None:
        """A pass that leaves everything as it was. DistributedDataParallel adds gradients up in an order that it finds
        out in its first pass and has from the second on: now all steps have it, where a run is resumed as elsewhere.

        Raises ValueError for parameters that get no gradient, for which the second pass would wait.
        """
        model = self.state.model
        before = [value.clone() for value in model.buffers()]
        self._backward(self.parts[-1], x_start, t, weights)
        for value, kept in zip(model.buffers(), before, strict=True):
            value.copy_(kept)
        for name, parameter in self.state.parameters.items():
            if parameter.grad is None:
                raise ValueError(
                    f"model: {name} gets no gradient, expected requires_grad=False for it on several ranks"
                )
        self._rehearsed = True

    def _backward(self, part: range, x_start: Tensor, t: Tensor, weights: Tensor) -> Tensor:
        """Adds the gradients of some rows; returns their losses, not weighted."""
        state, options, step = self.state, self.options, self.state.step
        here = slice(part.start - self.rows.start, part.stop - self.rows.start)
        torch.manual_seed(seed_for(options.seed, f"dropout/{part.start}", step))
        last = part.stop == self.rows.stop
        with nullcontext() if last or self.ranks.size == 1 else self._unsynchronised():
            losses = self.diffusion.train_losses(
                self._denoise,
                x_start[here],
                t[here],
                rng=Philox(options.seed, sample_ids=part.start, draw=step),
                reduction="none",
                **loss_options(self.options),
            )
            # Ranks' gradients are averaged: with this, the mean over the whole batch comes out.
            mean = (losses * weights[here]).sum() * (self.ranks.size / options.batch_size)
            state.scaler.scale(mean).backward()
        return losses.detach()

    def _unsynchronised(self) -> AbstractContextManager[None]:
        assert isinstance(self.parallel, DistributedDataParallel)
        return self.parallel.no_sync()

    def _denoise(self, x: Tensor, t: Tensor) -> Any:
        kind = self.options.autocast
        if kind == "none":
            return self.parallel(x, t)
        with torch.autocast(self.device.type, DTYPES[kind]):
            return self.parallel(x, t)

    def _update(self) -> Tensor:
        """Moves weights and average; returns the norm of the gradient before it was clipped."""
        state, options = self.state, self.options
        parameters = state.parameters.values()
        state.scaler.unscale_(state.optimizer)
        if options.clip:
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        else:
            norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.update_average(options.ema)
        return norm

    def numbers(self, saved: Callable[[], Path | None]) -> list[Row]:
        """The numbers of the steps since they were last asked for; the one place that waits for the device.

        `saved`: the newest checkpoint, for the message.

        Raises ValueError at the first loss or gradient that is not finite, on rank 0; the others end.
        """
        if not self._pending:
            return []
        found, self._pending = self._pending, []
        means = torch.stack([step.losses.double().sum() / self.options.batch_size for step in found]).cpu()
        losses = self.ranks.total(means).tolist()
        norms = torch.stack([step.norm for step in found]).tolist()
        # A loss scale that is too high makes gradients overflow; the scaler then leaves the step out, and halves it.
        scaler = self.state.scaler
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= _LEAST_SCALE
        for step, loss, norm in zip(found, losses, norms, strict=True):
            if not math.isfinite(loss) or not (math.isfinite(norm) or may_overflow):
                self._stop(step, loss, norm, saved)
        return [
            Row(step.step + 1, loss, norm, learning_rate(self.options, step.step))
            for step, loss, norm in zip(found, losses, norms, strict=True)
        ]

    def _stop(self, step: _Pending, loss: float, norm: float, saved: Callable[[], Path | None]) -> None:
        bad = step.t[~step.losses.isfinite()].tolist() if not math.isfinite(loss) else step.t.tolist()
        where = sorted({t for own in self.ranks.gather(bad) for t in own})

        def fail() -> None:
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            more = ", ..." if len(where) > _SHOWN else ""
            newest = saved()
            kept = "nothing was saved yet" if newest is None else f"the newest checkpoint is {newest}"
            raise ValueError(
                f"training: the {what} at step {step.step}, at timesteps {', '.join(map(str, where[:_SHOWN]))}{more}; "
                f"{kept}; a lower lr may help"
            )

        self.ranks.share(fail)


def loss_options(options: TrainOptions) -> dict[str, Any]:
    """What train_losses is told, but for samples and noise."""
    names = ("loss", "delta", "weighting", "vlb_weight", "offset_noise", "input_perturbation")
    return {name: getattr(options, name) for name in names}


def learning_rate(options: TrainOptions, step: int) -> float:
    """Rises over `warmup` steps, then falls along half a cosine to nothing at the end."""
    rise = min(1.0, (step + 1) / max(1, options.warmup))
    return options.lr * rise * 0.5 * (1 + math.cos(math.pi * step / options.steps))


def _share(rows: range, part: int, parts: int) -> range:
    """The part's rows of `rows`, as even as may be."""
    count = len(rows)
    return range(rows.start + count * part // parts, rows.start + count * (part + 1) // parts)
