"""One training step, on one or several ranks. Its losses stay on the device until they are logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ddpm_ext.base.ranks import Ranks, part_of
from ddpm_ext.base.seeds import seed_for
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.ops.noise import Philox
from ddpm_ext.training.captured_step import CapturedStep
from ddpm_ext.training.log import LogRow
from ddpm_ext.training.options import DTYPES, LR_SCHEDULES, TrainOptions
from ddpm_ext.training.state import TrainState

_TIMESTEPS_NAMED = 8  # the most timesteps that an error about an infinite or NaN loss names
# Below this scale of the float16 loss, gradients that overflow are an error: they would also overflow without scaling.
_SMALLEST_LOSS_SCALE = 1.0


class _Pending(NamedTuple):
    """A step that is not logged yet. Its tensors are on the device.

    t, losses: the timesteps and the weighted losses of this rank's samples, (samples,) each.
    norm: the norm of the gradient before it was clipped, ().
    """

    step: int
    t: Tensor
    losses: Tensor
    norm: Tensor


class TrainingStep:
    """Takes training steps, which change a TrainState.

    The noise of sample i in the batch of step s has, in the noise contract (ops/noise.py), sample id i, draw s and
    stream 2. The sample's timestep depends on the seed, s, i and the batch size, and on earlier losses if the timestep
    sampler learns. So noise and timesteps are the same for any number of ranks and of accumulated parts.

    Attributes:
        samples: the indices of this rank's samples in each batch, a range.
        parts: `samples`, divided into the parts whose gradients are accumulated.
    """

    def __init__(
        self, state: TrainState, diffusion: GaussianDiffusion, options: TrainOptions, ranks: Ranks, device: torch.device
    ) -> None:
        self.state, self.diffusion, self.options, self.ranks, self.device = state, diffusion, options, ranks, device
        self.samples = part_of(range(options.batch_size), ranks.rank, ranks.size)
        self.parts = [part_of(self.samples, part, options.accumulate) for part in range(options.accumulate)]
        self.parallel = ranks.parallel(state.model, device)
        self._sum_order_fixed = ranks.size == 1
        self._pending: list[_Pending] = []
        self._captured = CapturedStep(self._compute, state, device) if options.graph else None
        self._updates = 0  # how many updates of the weights have begun
        self._version_after_step = self._state_version()

    def take(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Takes the next step.

        Args:
            images: this rank's samples, (samples, channels, height, width).
            labels: their classes, (samples,) int64, for a class-conditional model.
        """
        state, options, step = self.state, self.options, self.state.step
        state.set_learning_rate(learning_rate(options, step))
        timesteps = state.timestep_sampler.sample(
            len(self.samples), seed=options.seed, iteration=step, first=self.samples.start, total=options.batch_size
        )
        x_start, t, weights = map(self._on_device, (images, *timesteps))
        labels = None if labels is None else self._on_device(labels)
        if not self._sum_order_fixed:
            self._fix_sum_order(x_start, t, weights, labels)
        if self._captured is None:
            losses, norm = self._compute(x_start, t, weights, step, labels)
        else:
            self._updates += 1
            losses, norm = self._captured.take(x_start, t, weights, labels, self._dropout_seed(self.samples.start))
        state.update_averages(options.ema)
        if state.timestep_sampler.learns:
            # Gathering the losses waits for the device, and for all ranks.
            all_timesteps, all_losses = zip(*self.ranks.gather((timesteps[0], losses.cpu())), strict=True)
            state.timestep_sampler.update(torch.cat(all_timesteps), torch.cat(all_losses), local=False)
        self._pending.append(_Pending(step, t, losses * weights, norm))
        state.step += 1
        self._version_after_step = self._state_version()

    def _state_version(self) -> tuple[int, list[tuple[int, int]]]:
        """A value that changes as soon as a step changes the state, that is, a buffer or the weights."""
        return self._updates, [(id(value), value._version) for value in self.state.model.buffers()]

    @property
    def whole(self) -> bool:
        """Whether the state is that after `state.step` whole steps. False if the next step failed half-way."""
        return self._version_after_step == self._state_version()

    @property
    def losses_known(self) -> bool:
        """Whether log_rows has read the losses of all steps. If so, they are finite: else it would have raised."""
        return not self._pending

    def _on_device(self, value: Tensor) -> Tensor:
        """A copy on the device. The host doesn't wait for the copy: for a GPU, this needs pinned memory."""
        return (value.pin_memory() if self.device.type == "cuda" else value).to(self.device, non_blocking=True)

    def _fix_sum_order(self, x_start: Tensor, t: Tensor, weights: Tensor, labels: Tensor | None) -> None:
        """Runs a forward and a backward pass that changes neither weights nor buffers.

        DistributedDataParallel determines in its first pass the order in which all later passes sum gradients. After
        this additional pass all steps use the same order, also the first step after a resume, so their bits are the
        same as without a resume.

        Raises:
            ValueError: a parameter gets no gradient. The second pass would wait for its gradient forever.
        """
        model = self.state.model
        before = [value.clone() for value in model.buffers()]
        self._backward(self.parts[-1], x_start, t, weights, self.state.step, labels)
        for value, saved in zip(model.buffers(), before, strict=True):
            value.copy_(saved)
        for name, parameter in self.state.parameters.items():
            if parameter.grad is None:
                raise ValueError(
                    f"model: {name} gets no gradient, expected requires_grad=False for it on several ranks"
                )
        self._sum_order_fixed = True

    def _compute(
        self, x_start: Tensor, t: Tensor, weights: Tensor, draw: int | Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Updates the model; returns the losses before the multiplication by `weights`, and the gradient's norm.

        weights: the weights of the losses, (samples,).
        draw: the step's number, which selects the noise.
        """
        self.state.optimizer.zero_grad(set_to_none=True)
        losses = torch.cat([self._backward(part, x_start, t, weights, draw, labels) for part in self.parts])
        return losses, self._update()

    def _dropout_seed(self, first: int) -> int:
        return seed_for(self.options.seed, f"dropout/{first}", self.state.step)

    def _backward(
        self, part: range, x_start: Tensor, t: Tensor, weights: Tensor, draw: int | Tensor, labels: Tensor | None
    ) -> Tensor:
        """Adds the gradient of `part`'s weighted losses to .grad; returns the losses unweighted, (len(part),)."""
        state, options = self.state, self.options
        in_batch = slice(part.start - self.samples.start, part.stop - self.samples.start)
        if self._captured is None:  # setting a seed is not allowed during the capture of a graph
            torch.manual_seed(self._dropout_seed(part.start))
        last, parallel = part.stop == self.samples.stop, self.parallel
        # Only the last part's backward pass averages gradients over the ranks.
        with nullcontext() if last or not isinstance(parallel, DistributedDataParallel) else parallel.no_sync():
            losses = self.diffusion.train_losses(
                self._denoise,
                x_start[in_batch],
                t[in_batch],
                rng=Philox(options.seed, sample_ids=part.start, draw=draw),
                reduction="none",
                model_kwargs=None if labels is None else {"labels": labels[in_batch]},
                **loss_options(self.options),
            )
            # Since gradients are averaged over the ranks, this factor makes the sum a mean over the whole batch.
            mean = (losses * weights[in_batch]).sum() * (self.ranks.size / options.batch_size)
            state.scaler.scale(mean).backward()
        return losses.detach()

    def _denoise(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Any:
        kind = self.options.autocast
        arguments = (x, t) if labels is None else (x, t, labels)
        if kind == "none":
            return self.parallel(*arguments)
        with torch.autocast(self.device.type, DTYPES[kind]):
            return self.parallel(*arguments)

    def _update(self) -> Tensor:
        """Updates the weights; returns the norm of the gradient before it was clipped."""
        state, options = self.state, self.options
        self._updates += 1
        parameters = state.parameters.values()
        state.scaler.unscale_(state.optimizer)
        if options.clip:
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        else:
            norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
        state.scaler.step(state.optimizer)
        state.scaler.update()
        return norm

    def newest_loss(self) -> float:
        """The loss of the last step, which is not logged yet. Reading it waits for the device; see at_hand."""
        return self._means(self._pending[-1:]).item()

    def _means(self, steps: list[_Pending]) -> Tensor:
        """This rank's part of each step's loss, (steps,) float64, on the device."""
        return torch.stack([step.losses.double().sum() / self.options.batch_size for step in steps])

    def log_rows(self, newest: Callable[[], Path | None]) -> list[LogRow]:
        """The steps since the last call, for the log.

        This waits for the device. (`take` does not, unless the timestep sampler learns from the losses.)

        Args:
            newest: returns the newest checkpoint's path or None, for the error message.

        Raises:
            ValueError: a loss or a gradient is not finite. Rank 0 raises it; the other ranks exit. After any error the
                steps stay pending, so the next call reads them again: this error is raised again, and after a
                ConnectionError the call may succeed.
        """
        if not self._pending:
            return []
        steps = self._pending
        by_quarter = quarters_of(steps, self.options.timesteps)
        totals = self.ranks.total(torch.cat([self._means(steps)[:, None], by_quarter], 1).cpu())
        losses, sums, counts = totals[:, 0].tolist(), totals[:, 1:5].tolist(), totals[:, 5:].tolist()
        norms = torch.stack([step.norm for step in steps]).tolist()
        # If the loss scale is too high, gradients overflow; the scaler then skips the step and halves the scale.
        scaler = self.state.scaler
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= _SMALLEST_LOSS_SCALE
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            if not math.isfinite(loss) or not (math.isfinite(norm) or may_overflow):
                self._fail(step, loss, norm, newest)
        self._pending = []
        return [
            LogRow(
                step.step + 1,
                loss,
                norm,
                learning_rate(self.options, step.step),
                tuple(quarter_sums),
                tuple(quarter_counts),
            )
            for step, loss, norm, quarter_sums, quarter_counts in zip(steps, losses, norms, sums, counts, strict=True)
        ]

    def _fail(self, step: _Pending, loss: float, norm: float, newest: Callable[[], Path | None]) -> None:
        """Raises ValueError on rank 0; the other ranks exit.

        The message names some timesteps, from all ranks: those of the losses that are not finite, or, if only the
        gradient is not finite, those of the whole batch.
        """
        bad = step.t[~step.losses.isfinite()].tolist() if not math.isfinite(loss) else step.t.tolist()
        timesteps = sorted({t for timesteps_of_rank in self.ranks.gather(bad) for t in timesteps_of_rank})

        def fail() -> None:
            problem = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            ellipsis = ", ..." if len(timesteps) > _TIMESTEPS_NAMED else ""
            path = newest()
            saved = "nothing was saved yet" if path is None else f"the newest checkpoint is {path}"
            raise ValueError(
                f"training: the {problem} at step {step.step}, at timesteps "
                f"{', '.join(map(str, timesteps[:_TIMESTEPS_NAMED]))}{ellipsis}; {saved}; a lower lr may help"
            )

        self.ranks.share(fail)


def at_hand(device: torch.device, ranks: Ranks) -> bool:
    """Whether a step's loss can be read right after the step, without waiting for a GPU or for other ranks."""
    return device.type == "cpu" and ranks.size == 1


def quarters_of(steps: list[_Pending], timesteps: int) -> Tensor:
    """For each step, the sum of the losses in each quarter of the timesteps, then the number of losses in each.

    The result is (steps, 8) float64, on the device.

    This doesn't wait for the device.
    """
    t, losses = (torch.stack([getattr(step, name) for step in steps]) for name in ("t", "losses"))
    in_quarter = (t * 4 // timesteps)[..., None] == torch.arange(4, device=t.device)  # (steps, samples, 4)
    sums = torch.where(in_quarter, losses.double()[..., None], 0.0).sum(1)
    return torch.cat([sums, in_quarter.sum(1).double()], 1)


def loss_options(options: TrainOptions) -> dict[str, Any]:
    """The options of the run that are arguments of train_losses."""
    names = ("loss", "delta", "weighting", "vlb_weight", "offset_noise", "input_perturbation")
    return {name: getattr(options, name) for name in names}


def learning_rate(options: TrainOptions, step: int) -> float:
    """The learning rate of a step: the highest rate, times a linear rise over `warmup` steps, times the schedule.

    step: the step's number, from 0.
    """
    rise = min(1.0, (step + 1) / max(1, options.warmup))
    return options.lr * rise * LR_SCHEDULES[options.lr_schedule](step / options.steps)
