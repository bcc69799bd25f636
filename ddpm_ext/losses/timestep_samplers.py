"""Timestep samplers: the timesteps of a training iteration, and the weights of its losses.

A sample's timestep is drawn by the seed, the iteration and the sample's index in the batch over all ranks, like noise
(ddpm_ext.ops.noise) with stream 3, the iteration as draw and the index as sample id. LowDiscrepancy draws one number
for the whole batch, with sample id 0. So a sample's timestep does not depend on the number of ranks, nor on a division
into smaller batches. The expectation of the weighted loss is the mean of the loss over all timesteps. LogitNormal and
Mode are exceptions: their density is meant to weight the loss, so all weights are 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.ops.noise import STREAM_TIMESTEPS
from ddpm_ext.ops.philox import philox4x32

_INDICES = 2**56  # an index in the batch is below this limit of sample ids


def _uniforms(seed: int, iteration: int, indices: Tensor) -> Tensor:
    """A uniform number for each index, float64 in (0, 1): (w0 + 1/2) / 2^32, with w0 Philox's first word."""
    word = torch.zeros_like(indices)
    counter = torch.stack(
        [word, word + iteration, indices & 0xFFFFFFFF, (indices >> 32) + (STREAM_TIMESTEPS << 24)], -1
    )
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32], device=indices.device)
    return (philox4x32(counter, key)[..., 0].double() + 0.5) / 2**32


class TimestepSampler:
    """The base of all timestep samplers.

    Args:
        timesteps: the number of timesteps of the diffusion, at least 1.

    Attributes:
        learns: whether update() changes the probabilities of timesteps.

    Examples:
        >>> from ddpm_ext.losses.timestep_samplers import Uniform
        >>> sampler = Uniform(1000)
        >>> t, weights = sampler.sample(4, seed=0, iteration=17)
        >>> sampler.update(t, torch.rand(4))  # the losses at t, for samplers that learn
        >>> sampler.load_state_dict(sampler.state_dict())  # for checkpoints
    """

    learns = False

    def __init__(self, timesteps: int) -> None:
        self.timesteps = checks.integer("timesteps", timesteps, 2**31, "2^31", 1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.timesteps})"

    def probabilities(self) -> Tensor:
        """The probability of each timestep, float64 (timesteps,); their sum is 1."""
        return torch.full((self.timesteps,), 1 / self.timesteps, dtype=torch.float64, device="cpu")

    def sample(
        self,
        batch_size: int,
        *,
        seed: int,
        iteration: int,
        first: int = 0,
        total: int | None = None,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """The timesteps of samples first to first + batch_size - 1 of a batch of `total`.

        Args:
            batch_size: the number of samples, at least 0.
            seed: 0 <= seed < 2^64.
            iteration: 0 <= iteration < 2^32.
            first: the first sample's index in the batch over all ranks.
            total: the size of the batch over all ranks. None means first + batch_size.
            device: the device of the results, which are computed on the CPU.

        Returns:
            t, int64 (batch_size,), and their weights, float32 (batch_size,): 1 / (timesteps p(t)), or all 1 for
            LogitNormal and Mode.

        Raises:
            TypeError, ValueError: an argument has a wrong type or is out of range.
        """
        checks.integer("batch_size", batch_size, _INDICES, "2^56")
        checks.integer("seed", seed, 2**64, "2^64")
        checks.integer("iteration", iteration, 2**32, "2^32")
        checks.integer("first", first, _INDICES, "2^56")
        stop = first + batch_size
        total = checks.integer("total", stop if total is None else total, _INDICES, "2^56")
        if stop > total:
            raise ValueError(f"first is {first} and batch_size {batch_size}, expected at most total, {total}, together")
        device = checks.device(device)
        indices = torch.arange(first, stop, device="cpu")
        t, weights = self._pick(self._positions(indices, total, seed, iteration))
        return t.to(device), weights.to(device)

    def _positions(self, indices: Tensor, total: int, seed: int, iteration: int) -> Tensor:
        """For each sample, by its index in the batch, a random float64 in [0, 1), from which `_pick` makes a timestep.

        The base class draws them independently. `total`, the size of the batch, is for subclasses that spread them.
        """
        return _uniforms(seed, iteration, indices)

    def _pick(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The timesteps and weights at these positions in [0, 1).

        Each timestep has an interval in [0, 1) whose length is its probability. The intervals are in the order of the
        timesteps.
        """
        t = (positions * self.timesteps).long().clamp(max=self.timesteps - 1)
        return t, torch.ones_like(t, dtype=torch.float32)

    def update(self, t: Tensor, losses: Tensor, *, local: bool = True) -> None:
        """Learns from the unweighted losses of an iteration. The base class learns nothing.

        Args:
            t: int64 (n,).
            losses: (n,), on any device.
            local: whether the losses are those of this rank alone. Then all ranks of torch.distributed must call this
                method, and each learns from the losses of all ranks, in their order. With False, the losses are those
                of the whole batch.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """The state that update() has learned, {name: tensor}; empty in the base class."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the result of state_dict.

        Raises TypeError or ValueError unless the state has the names, dtypes and shapes of this sampler's own state.
        """
        if state:
            raise ValueError(
                f"state has {', '.join(state)}, expected nothing, as a {type(self).__name__} learns nothing"
            )


class Uniform(TimestepSampler):
    """Draws each timestep independently, all with the same probability: Ho et al. 2020, algorithm 1.

    Examples:
        >>> t, weights = Uniform(1000).sample(4, seed=0, iteration=17)
    """


class LowDiscrepancy(TimestepSampler):
    """Spreads the timesteps of a batch evenly: sample i of B gets the timestep at the share (u + i / B) mod 1 of all
    timesteps, with one uniform u for the batch.

    The timestep of a single sample is uniform. Each of B equal ranges of timesteps gets one sample, so the loss varies
    less between iterations. Kingma et al. 2021, "Variational Diffusion Models", appendix I.1.

    Examples:
        >>> t, weights = LowDiscrepancy(1000).sample(4, seed=0, iteration=17)
        >>> t.sort().values.diff().tolist()
        [250, 250, 250]
    """

    def _positions(self, indices: Tensor, total: int, seed: int, iteration: int) -> Tensor:
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        return (_uniforms(seed, iteration, first) + indices.double() / max(total, 1)) % 1


class _Weighted(TimestepSampler):
    """Draws each timestep independently, by `probabilities()`."""

    def _pick(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.probabilities()
        ends = probabilities.cumsum(0)
        t = torch.searchsorted(ends / ends[-1], positions, right=True).clamp(max=self.timesteps - 1)
        return t, (1 / (self.timesteps * probabilities[t])).float()


class Importance(_Weighted):
    """Draws timesteps with the caller's probabilities.

    Args:
        density: (timesteps,), finite and above 0, of any real dtype. It is divided by its sum.

    Raises:
        TypeError, ValueError: density is no such tensor.

    Examples:
        >>> sampler = Importance(torch.linspace(2, 1, 1000))  # prefers timesteps with little noise
    """

    def __init__(self, density: Tensor) -> None:
        checks.tensor("density", density)
        if density.is_complex() or density.dtype == torch.bool:
            raise TypeError(f"density has dtype {density.dtype}, expected a real one")
        if density.dim() != 1 or not len(density):
            raise ValueError(f"density has shape {tuple(density.shape)}, expected (timesteps,)")
        super().__init__(len(density))
        density = density.detach().to("cpu", torch.float64)
        checks.refuse("density", density, ~((density > 0) & density.isfinite()), "finite numbers above 0")
        density = density / density.max()  # so that the sum can't overflow
        self._probabilities = density / density.sum()

    def probabilities(self) -> Tensor:
        return self._probabilities.clone()


class LossSecondMoment(_Weighted):
    """Draws timesteps in proportion to the root mean square of their last losses: Nichol & Dhariwal 2021, eq. (18).

    The probabilities are uniform until each timestep has `history` losses, and while these are all 0. Losses that are
    not finite are ignored.

    Args:
        timesteps: the number of timesteps of the diffusion, at least 1.
        history: the number of each timestep's last losses that count, at least 1.
        uniform_probability: the share of the probability that is spread evenly over all timesteps, in (0, 1].

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Examples:
        >>> sampler = LossSecondMoment(1000)
        >>> t, weights = sampler.sample(4, seed=0, iteration=17)
        >>> sampler.update(t, losses=torch.rand(4))
    """

    learns = True

    def __init__(self, timesteps: int, history: int = 10, uniform_probability: float = 0.001) -> None:
        super().__init__(timesteps)
        history = checks.integer("history", history, 2**31, "2^31", 1)
        if not 0 < checks.real("uniform_probability", uniform_probability) <= 1:
            raise ValueError(f"uniform_probability is {uniform_probability}, expected 0 < uniform_probability <= 1")
        self.uniform_probability = float(uniform_probability)
        # For each timestep, a ring buffer of its last losses, and the number of its losses so far.
        self._losses = torch.zeros(self.timesteps, history, dtype=torch.float64, device="cpu")
        self._counts = torch.zeros(self.timesteps, dtype=torch.int64, device="cpu")

    def probabilities(self) -> Tensor:
        uniform = super().probabilities()
        if (self._counts < self._losses.shape[1]).any():
            return uniform
        root = self._losses.square().mean(1).sqrt()
        total = root.sum()
        if not 0 < total < math.inf:  # all losses are 0, or their squares underflow or overflow
            return uniform
        return (1 - self.uniform_probability) * root / total + self.uniform_probability * uniform

    def update(self, t: Tensor, losses: Tensor, *, local: bool = True) -> None:
        """Stores the losses at their timesteps, except those that are not finite: see TimestepSampler.update.

        Raises TypeError or ValueError for arguments that have a wrong type, shape or dtype, or are out of range.
        """
        checks.tensor("t", t)
        checks.samples("losses", losses)
        if losses.dim() != 1:
            raise ValueError(f"losses has shape {tuple(losses.shape)}, expected (n,)")
        t, losses = t.detach().cpu(), losses.detach().to("cpu", torch.float64)
        checks.per_sample("t", t, len(losses), t.device, self.timesteps - 1)
        local_losses = t.tolist(), losses.tolist()
        for timesteps, values in _of_all_ranks(local_losses) if local else [local_losses]:
            for timestep, loss in zip(timesteps, values, strict=True):
                if math.isfinite(loss):
                    self._losses[timestep, self._counts[timestep] % self._losses.shape[1]] = loss
                    self._counts[timestep] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of "losses", the last losses of each timestep, float64 (timesteps, history), and "counts", how many
        losses each timestep has had, int64 (timesteps,)."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        current = self.state_dict()
        if set(state) != set(current):
            raise ValueError(f"state has {', '.join(state) or 'nothing'}, expected {' and '.join(current)}")
        for name, value in current.items():
            checks.tensor(name, state[name])
            kind = state[name].dtype, tuple(state[name].shape)
            if kind != (value.dtype, tuple(value.shape)):
                raise ValueError(
                    f"{name} is {kind[0]} of shape {kind[1]}, expected {value.dtype} of shape {tuple(value.shape)}"
                )
        self._losses, self._counts = (state[name].to("cpu", copy=True) for name in current)


class _Density(TimestepSampler):
    """Draws a time in (0, 1) by a density. Near 0 there is little noise, near 1 much.

    The times from k / timesteps to (k + 1) / timesteps belong to timestep k.
    """

    def _quantile(self, positions: Tensor) -> Tensor:
        """The quantile function of the density: for each of these probabilities p, the time below which a drawn time
        lies with probability p, float64.
        """
        raise NotImplementedError

    def _pick(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return super()._pick(self._quantile(positions))

    def _edges(self) -> Tensor:
        """The times at which timesteps begin and end, float64 (timesteps + 1,)."""
        return torch.arange(self.timesteps + 1, dtype=torch.float64, device="cpu") / self.timesteps


class LogitNormal(_Density):
    """Draws times whose logit is normal: Esser et al. 2024, section 3.1.

    Args:
        timesteps: the number of timesteps of the diffusion, at least 1.
        logit_mean: the mean of the logit, finite. Above 0, noisier timesteps are more frequent. In diffusers' training
            scripts it has the opposite sign, because they index descending timesteps.
        logit_std: the standard deviation of the logit, finite, above 0.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Examples:
        >>> sampler = LogitNormal(1000, logit_mean=0.5)
    """

    def __init__(self, timesteps: int, logit_mean: float = 0.0, logit_std: float = 1.0) -> None:
        super().__init__(timesteps)
        self.logit_mean = checks.finite("logit_mean", logit_mean)
        self.logit_std = checks.finite("logit_std", logit_std)
        if not self.logit_std > 0:
            raise ValueError(f"logit_std is {logit_std}, expected logit_std > 0")

    def _quantile(self, positions: Tensor) -> Tensor:
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(positions))

    def probabilities(self) -> Tensor:
        ends = (torch.logit(self._edges()) - self.logit_mean) / self.logit_std
        # A timestep's probability is the difference of the distribution function at its two ends. Above the mean, both
        # values are near 1, and their difference would lose digits. There the complements are subtracted.
        sign = torch.where(ends[:-1] > 0, -1.0, 1.0)
        low, high = (torch.special.ndtr(sign * end) for end in (ends[:-1], ends[1:]))
        return (high - low).abs()


class Mode(_Density):
    """Draws times near 1/2 more often for a scale above 0, and times near 0 and 1 more often for a scale below 0.

    At 0 it is uniform. This is "mode sampling with heavy tails" of Esser et al. 2024, section 3.1.

    Args:
        timesteps: the number of timesteps of the diffusion, at least 1.
        mode_scale: s of the paper, in [-1, 2 / (pi - 2)], the range in which the quantile function does not fall.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Examples:
        >>> sampler = Mode(1000, mode_scale=0.8)
    """

    LARGEST = 2 / (math.pi - 2)

    def __init__(self, timesteps: int, mode_scale: float = 1.29) -> None:
        super().__init__(timesteps)
        self.mode_scale = checks.finite("mode_scale", mode_scale)
        if not -1 <= self.mode_scale <= self.LARGEST:
            raise ValueError(f"mode_scale is {mode_scale}, expected -1 <= mode_scale <= 2 / (pi - 2)")

    def _quantile(self, positions: Tensor) -> Tensor:
        """The function of the paper with u = 1 - positions, so that it increases with the position."""
        return positions - self.mode_scale * (torch.sin(math.pi / 2 * positions) ** 2 - positions)

    def probabilities(self) -> Tensor:
        edges = self._edges()
        low, high = torch.zeros_like(edges), torch.ones_like(edges)
        # The quantile function has no inverse in closed form: bisection finds the probability below each edge.
        for _ in range(60):
            middle = (low + high) / 2
            below = self._quantile(middle) < edges
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high.diff()


def _of_all_ranks(value: Any) -> list[Any]:
    """The `value` of every rank of torch.distributed, in the order of ranks; [value] if it is not initialized."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


TIMESTEP_SAMPLERS: dict[str, Callable[..., TimestepSampler]] = {
    "uniform": Uniform,
    "low_discrepancy": LowDiscrepancy,
    "loss_second_moment": LossSecondMoment,
    "logit_normal": LogitNormal,
    "mode": Mode,
}


def make_timestep_sampler(name: str, timesteps: int, **options: Any) -> TimestepSampler:
    """A sampler by its name in TIMESTEP_SAMPLERS, with the options of its class.

    Raises TypeError and ValueError as the class, and ValueError for an unknown name.

    Examples:
        >>> from ddpm_ext.losses.timestep_samplers import make_timestep_sampler
        >>> sampler = make_timestep_sampler("logit_normal", 1000)
    """
    return TIMESTEP_SAMPLERS[checks.one_of("timestep_sampler", name, TIMESTEP_SAMPLERS)](timesteps, **options)
