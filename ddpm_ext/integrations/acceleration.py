"""Acceleration: the settings of an accelerated object, and the generators of the noise of its loops."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.ops.noise import (
    STREAM_FORWARD,
    STREAM_REVERSE,
    STREAM_START,
    Philox,
    check_rng_of_many,
    fresh_rng,
    random_seed,
)

NOISES = ("torch", "philox")
PROOF = "a first loop proves its rows"  # the reason for a fallback in such a loop, see proof.py
_log = logging.getLogger(__name__)
# The values of Acceleration._position before the first step of a loop, and after a loop has ended.
BEFORE_LOOP, AFTER_LOOP = -math.inf, math.inf


if TYPE_CHECKING:

    class AcceleratedObject(Any):  # Python has no intersection types, so all other attributes are Any.
        """What `accelerate` returns."""

        @property
        def accelerated(self) -> Acceleration: ...

else:

    @runtime_checkable
    class AcceleratedObject(Protocol):
        """What `accelerate(obj)` returns. Its class is a subclass of obj's class, or TableScheduler.

        Attributes:
            accelerated: the settings, an Acceleration.
        """

        accelerated: Acceleration


class Acceleration:
    """An accelerated object's settings, `obj.accelerated`.

    With noise "philox", two loops never share noise, unless they have the same seed and sample ids:

    - Without a seed, each loop draws a seed from torch's default CPU generator, when it first needs noise.
    - With a seed, each loop takes the sample ids that follow the previous loop's: for batches of 64, these are 0 to
      63, then 64 to 127.
    - Sample ids in a tensor are used in every loop. With a seed, all loops have the same noise in this case.

    A loop begins as follows:

    - Each call of a method that is a whole loop is a loop: p_sample_loop, ddim_sample_loop, sample, interpolate, and
      denoising-diffusion-pytorch's ddim_sample. (guided-diffusion's ddim_sample is a single step.)
    - diffusers' set_timesteps begins a loop, and so does `begin_loop()`. The following steps belong to this loop.
    - A call of a pipeline begins a loop. The call's start noise and the steps after its first set_timesteps belong to
      this loop.
    - A single step at a larger timestep than the previous step's begins a loop. A step at the same timestep as the
      previous step stays in the loop, as part of the same batch: it takes the sample ids that follow those already used
      at this timestep. A batch with several timesteps begins a loop unless all are smaller than the previous step's.
    - Timesteps on a GPU are not read back; only diffusers' schedulers know them on the host. In other libraries, single
      steps on a GPU begin a loop after as many steps as there are timesteps; a shorter loop needs `begin_loop()`.
    - Under torch.compile, timesteps of single steps are not read, either. With a seed, a loop of these steps needs
      `begin_loop()` or set_timesteps. Without a seed, each of them draws a seed.

    Attributes:
        noise: "torch" for the library's draws, or "philox" for noise of the noise contract.
        seed: the seed of all loops. With None, each loop draws a seed. After it is set, the next loop has the first
            sample ids.
        rng: the ddpm_ext.Philox of the current loop, or None with noise "torch". It may be set to a Philox that has no
            draw, and either no stream or `stream`. The next loop has its seed and sample ids, and later loops have the
            ids that follow. Setting anything else raises TypeError or ValueError.
        stream: the stream of the steps' noise, by default the stream of reverse steps. The second and later schedulers
            of a pipeline have other streams, so that they share no noise although they have the same seed and ids.
        trace: whether steps that a user wrote are replaced by rows, once a first loop has proven the rows (see
            `accelerate`).
        iteration: how often training noise was drawn, which is the number of the next draw. Training noise always has
            the first sample ids, no matter how many loops have run.
        fallbacks: {method: the latest reason why the library's code ran in place of the fused form}.
        fused_calls: how many calls of methods took their fused form, which is mostly one launch.
        fallback_calls: how many calls ran the library's code for a recorded reason. If the library rejects a call's
            arguments, no reason is recorded. Neither number counts calls of diffusers' set_timesteps and
            scale_model_input, or calls that are part of a graph of torch.compile.

    Examples:
        >>> scheduler = accelerate(diffusers.DDPMScheduler(), noise="philox", seed=0)
        >>> scheduler.accelerated.seed = 1  # the next loop has the first sample ids
        >>> scheduler.accelerated.begin_loop()
        >>> scheduler.accelerated.rng
        Philox(seed=1, ...)
        >>> text = scheduler.accelerated.summary()
    """

    _rng: Philox | None

    def __init__(
        self,
        noise: str = "torch",
        seed: int | Tensor | None = None,
        sample_ids: int | Tensor = 0,
        stream: int = STREAM_REVERSE,
        trace: bool = False,
    ) -> None:
        self.noise = noise
        self.trace = trace
        self.stream = stream
        self.iteration = 0
        self._running_calls = 0  # how many calls of pipelines, nested in each other, are running
        self.fallbacks: dict[str, str] = {}
        self.fused_calls = self.fallback_calls = 0
        self._warned: set[tuple[str, str]] = set()
        self._set(seed, sample_ids)

    @classmethod
    def of(cls, noise: str, seed: int | None, sample_ids: int | Tensor, trace: bool = False) -> Acceleration:
        """The settings from accelerate's arguments. Raises TypeError or ValueError for wrong arguments."""
        checks.one_of("noise", noise, NOISES)
        checks.flag("trace", trace)
        if noise == "philox":
            Philox(0 if seed is None else seed, sample_ids)  # raises an error if one is wrong
            return cls(noise, seed, sample_ids, trace=trace)
        if seed is not None:
            raise ValueError(f"seed is {seed!r} with noise 'torch', expected None: torch draws the noise")
        if isinstance(sample_ids, Tensor) or sample_ids != 0:
            raise ValueError(f"sample_ids is {sample_ids!r} with noise 'torch', expected 0: torch draws the noise")
        return cls(noise, trace=trace)

    def of_stream(self, stream: int) -> Acceleration:
        """New settings with the same noise, seed and sample ids, but with another stream for the steps' noise."""
        return Acceleration(self.noise, self._seed, self._sample_ids, stream, self.trace)

    def __copy__(self) -> Acceleration:
        copy_of_self = object.__new__(type(self))
        copy_of_self.__dict__.update(self.__dict__, fallbacks=dict(self.fallbacks), _warned=set(self._warned))
        return copy_of_self

    def continued(self) -> Acceleration:
        """A copy for another object. It continues the loops' sample ids, but has no fused calls or fallbacks yet."""
        copy_of_self = copy.copy(self)
        vars(copy_of_self).update(fallbacks={}, fused_calls=0, fallback_calls=0, _running_calls=0, _warned=set())
        return copy_of_self

    def __repr__(self) -> str:
        attributes = {"noise": self.noise, "rng": self._rng, "fallbacks": self.fallbacks}
        return f"Acceleration({', '.join(f'{name}={value!r}' for name, value in attributes.items())})"

    def summary(self) -> str:
        """A line of text: the noise, and how many calls were fused or fell back so far."""
        seed = f" of seed {self._seed}" if self._seed is not None else ""
        reasons = "; ".join(f"{method}: {reason}" for method, reason in self.fallbacks.items())
        counts = f"fused calls: {self.fused_calls}, fallbacks: {self.fallback_calls}"
        return f"noise {self.noise!r}{seed}, {counts}" + (f" ({reasons})" if reasons else "")

    # ------------------------------------------------------------------------------------------------- seed and ids

    def _set(self, seed: int | Tensor | None, sample_ids: int | Tensor) -> None:
        self._seed, self._sample_ids = seed, sample_ids
        self._ids = sample_ids  # the sample ids of the current loop, in the form that Philox takes
        self._count = 0  # how many sample ids the loop has used
        self._begin()

    @property
    def seed(self) -> int | Tensor | None:
        return self._seed

    @seed.setter
    def seed(self, seed: int | Tensor | None) -> None:
        if self.noise == "torch":
            raise ValueError(f"seed is {seed!r} with noise 'torch', expected noise 'philox': torch draws the noise")
        if seed is not None:
            Philox(seed)  # raises an error if it is wrong
        self._set(seed, self._sample_ids)

    @property
    def rng(self) -> Philox | None:
        if self._rng is None and self.noise == "philox":
            self._rng = self._philox(random_seed() if self._seed is None else self._seed, self._ids)
        return self._rng

    @rng.setter
    def rng(self, rng: Philox | None) -> None:
        if (rng is None) != (self.noise == "torch"):
            raise ValueError(f"rng is {rng} with noise {self.noise!r}, expected a Philox with 'philox', else None")
        if rng is not None:
            if isinstance(rng, Philox) and rng.stream == self.stream:
                rng = Philox(*rng.seed_and_ids(), draw=rng.draw)
            check_rng_of_many(rng)
            self._set(*rng.seed_and_ids())

    def _philox(self, seed: int | Tensor, sample_ids: int | Tensor) -> Philox:
        return Philox(seed, sample_ids, stream=None if self.stream == STREAM_REVERSE else self.stream)

    # -------------------------------------------------------------------------------------------------------- loops

    def _begin(self) -> None:
        self._position: float = BEFORE_LOOP  # the last step's position in the loop, a number that rises along it
        self._used_at_position = 0  # how many sample ids the steps at this position have used
        self._steps_with_unread_times = 0  # how many steps had timesteps on a GPU, which are not read
        self._starts = 0  # how often start noise was drawn in this loop
        self._rng = None
        if self._seed is not None:  # with a seed, the Philox is created here, so that compiled steps only read it
            self._rng = self._philox(self._seed, self._ids)

    def begin_loop(self) -> None:
        """Begins a loop. The single steps that follow belong to it.

        It does nothing with noise "torch", or if the running call of a pipeline has begun a loop that has taken no step
        yet.
        """
        pipeline_began_it = self._running_calls and self._position == BEFORE_LOOP
        if self.noise == "torch" or pipeline_began_it:
            return
        if self._seed is not None and not isinstance(self._ids, Tensor):
            self._ids += self._count
        self._count = 0
        self._begin()

    def end_loop(self) -> None:
        """Ends the loop: the next single step begins another loop."""
        self._position = AFTER_LOOP

    @contextlib.contextmanager
    def within_call(self) -> Iterator[None]:
        """Wraps a call of a pipeline. The call begins a loop, and its first set_timesteps does not begin another."""
        self.begin_loop()
        self._running_calls += 1
        try:
            yield
        finally:
            self._running_calls -= 1

    def rng_of_start(self, batch: int) -> Philox:
        """The generator of the start noise of a loop of `batch` samples.

        Each call of this method in a loop has another draw, and so has each scheduler of a pipeline. The first call of
        the first scheduler has the draw of p_sample_loop's start noise, which is 0.
        """
        assert self.rng is not None
        draw = 16 * self._starts + self.stream  # the streams of reverse steps are below 16
        self._starts += 1
        self._count = max(self._count, batch)
        return self.rng.of(STREAM_START, draw)

    def whole_loop(self, batch: int) -> Philox | None:
        """Begins a loop of `batch` samples for a call that is a whole loop. Returns the generator of its noise.

        The result is None if the library draws the noise.
        """
        if self.noise == "torch":
            return None
        self.begin_loop()
        self._count = batch
        self.end_loop()
        return self.rng

    def rng_of_step(self, batch: int, first: int, last: int | None = None) -> Philox | None:
        """The generator of a single step of `batch` samples; None if the library draws the noise.

        Args:
            first, last: the range of the samples' positions in the loop, numbers that rise along it. Without `last`,
                all samples are at `first`.
        """
        if self.noise == "torch":
            return None
        if torch.compiler.is_compiling():
            return self._rng_of_unread_step(batch)
        used_ids = 0
        if first <= self._position:
            if first == self._position and last is None:
                used_ids = self._used_at_position
            else:
                self.begin_loop()
        self._position = first if last is None else last
        self._used_at_position = used_ids + batch
        self._count = max(self._count, self._used_at_position)
        rng = self._rng or self.rng
        if used_ids and not isinstance(self._ids, Tensor):
            assert rng is not None
            return self._philox(rng.seed_and_ids()[0], self._ids + used_ids)
        return rng

    def rng_of_step_at(self, t: Tensor, timesteps: int) -> Philox | None:
        """rng_of_step for a tensor of each sample's timestep, (batch,), in a loop of at most `timesteps` steps."""
        if self.noise == "torch":
            return None
        if torch.compiler.is_compiling():
            return self._rng_of_unread_step(len(t))
        if t.is_cpu and t.numel() > 0:
            values = t.tolist()
            if values.count(values[0]) == len(values):
                return self.rng_of_step(len(values), -values[0])
            return self.rng_of_step(len(values), -max(values), -min(values))
        if self._position == AFTER_LOOP or self._steps_with_unread_times >= timesteps:
            self.begin_loop()
        self._steps_with_unread_times += 1
        return self._rng_of_unread_step(len(t))

    def _rng_of_unread_step(self, batch: int) -> Philox | None:
        if self._seed is None and torch.compiler.is_compiling():  # a seed as an int would be a constant of the graph
            return self._philox(torch.ops.ddpm_ext.draw_seed(), self._ids)
        if batch > self._count:
            self._count = batch
        return self._rng or self.rng

    def next_forward(self, device: torch.device) -> Philox | None:
        """The generator of a training batch's noise on `device`. Each call returns a different draw.

        None if the library draws the noise.
        """
        if self.noise == "torch":
            return None
        draw, self.iteration = self.iteration, self.iteration + 1
        seed = fresh_rng(device).seed_and_ids()[0] if self._seed is None else self._seed
        return Philox(seed, self._sample_ids, stream=STREAM_FORWARD, draw=draw)

    # ---------------------------------------------------------------------------------------------------- fallbacks

    def record_proof(self, library: str, method: str, failed: str | None, begins: bool) -> None:
        """Records a step that ran both the object's code and the rows, to prove that their results agree (proof.py).

        With noise "philox", the first step warns that this loop has the noise of the object's code.

        Args:
            failed: the reason why the rows are not proven; None if their result agrees with that of the object's code.
            begins: whether the step is the first of its loop.
        """
        if failed is not None or (begins and self.noise == "philox"):
            self.record_fallback(library, method, failed or PROOF)
            return
        if begins:
            self.fallbacks[method] = PROOF
        self.fallback_calls += 1

    def record_fallback(self, library: str, method: str, reason: str) -> None:
        """Records why the library's code runs. Warns and logs once for each reason."""
        self.fallbacks[method] = reason
        if not torch.compiler.is_compiling():
            self.fallback_calls += 1
        if (method, reason) not in self._warned:
            self._warned.add((method, reason))
            noise = " and noise" if self.noise == "philox" else ""
            text = f"{method} runs the own code{noise} of {library}: {reason}"
            warnings.warn(text, stacklevel=_level_outside())
            if not torch.compiler.is_compiling():
                _log.info(text)


def _level_outside() -> int:
    """The stacklevel of a warning for the first calling frame whose code is neither of this package nor of torch."""
    if torch.compiler.is_compiling():  # torch.compile can't trace the code below, which reads frames
        return 1
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("ddpm_ext.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level
