"""The sampling loops that tuning compares: one model, fixed options, and the same noise for every step table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Model
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.ops.noise import STREAM_START, Philox
from ddpm_ext.process.model_output import unwrap
from ddpm_ext.tables.step_table import StepTable


class CountedModel:
    """A model that counts its calls and stores its last output.

    Attributes:
        calls: the number of calls so far.
        on_call: a function that is called after each call, for a progress bar.
        output: the output of the last call, or None before the first.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.calls = model, 0
        self.on_call: Callable[..., object] = lambda: None
        self.output: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.output = unwrap(self.model(*args, **kwargs))
        self.calls += 1
        self.on_call()
        return self.output


@dataclass(frozen=True)
class Batch:
    """One batch of samples before its loop.

    Attributes:
        loops: the loops that can sample it.
        rng: the seed and the first sample id of its noise.
        noise: standard normals. A loop begins with them times the standard deviation of its first samples: 1 for
            variance-preserving samples, and otherwise that of the first level's noise.
    """

    loops: Loops
    rng: Philox
    noise: Tensor


class Loops:
    """Sampling loops of a model that differ only in their step tables.

    Args:
        diffusion, model, device: see p_sample_loop.
        shape: the shape of a batch.
        rng: seed and first sample id. The sample ids of a batch continue those of the previous batch.
        options: further options of p_sample_loop, for all loops.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range, or the diffusion's variance is learned.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        shape: tuple[int, ...],
        *,
        device: torch.device | str | None = None,
        rng: Philox,
        **options: Any,
    ) -> None:
        if diffusion.variance_entry.learned:
            raise ValueError(
                f"diffusion has the variance {diffusion.variance!r}, expected a fixed one: tuned steps add no noise, "
                "so that a learned variance would have no meaning"
            )
        self.diffusion, self.model = diffusion, CountedModel(model)
        self.shape = checks.shape(shape, least=1)
        self.options: dict[str, Any] = {**options, "record": "last", "progress": False}
        parameter = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
        self.device = checks.device(device or (torch.device("cpu") if parameter is None else parameter.device))
        seed, ids = rng.seed_and_ids()
        if isinstance(seed, Tensor) or isinstance(ids, Tensor):
            raise ValueError(f"rng is {rng}, expected a seed and a first sample id that are ints")
        self._seed, self._first_id = seed, ids

    def batch(self, number: int) -> Batch:
        """Batch `number`: its sample ids begin number * shape[0] after the rng's first id."""
        rng = Philox(self._seed, self._first_id + number * self.shape[0])
        noise = self.diffusion.ops.randn(self.shape, rng.of(STREAM_START, 0), device=self.device)
        return Batch(self, rng, noise)

    def samples(self, table: StepTable, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
        """The final samples of a loop that stores its samples in `dtype`.

        The dtype of the model's input does not depend on `dtype`.
        """
        return self.run(table, rng=batch.rng, device=self.device, dtype=dtype)

    def run(self, table: StepTable, dtype: torch.dtype = torch.float32, **start: Any) -> Tensor:
        """The final samples of a loop. start: options about its first samples: noise, or rng and device."""
        options: dict[str, Any] = {**self.options, "dtype": dtype, **start}
        input_dtype = options.get("input_dtype") or torch.float32

        def model(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.model(x.to(input_dtype), *args, **kwargs).to(dtype)

        if dtype is not torch.float32:
            options["input_dtype"] = None
        called = self.model if dtype is torch.float32 else model
        drawn = self.diffusion.p_sample_loop(called, self.shape, sampler=table, **options)
        assert isinstance(drawn, Tensor)  # with record="last"
        return drawn

    def fails(self, table: StepTable, batch: Batch) -> bool:
        """Whether a loop with this table raises an exception.

        For example, a model that looks its timesteps up in an embedding fails at timesteps that are not integers.
        """
        try:
            self.samples(table, batch)
        except Exception:  # the model's code may raise anything
            return True
        return False

    def unconditional(self) -> Tensor | None:
        """The unconditional output of the model's last call, or None if that call did not have the batch twice.

        It has the batch twice in a guided step, unless the Guidance has a function for the unconditional output.
        """
        output = self.model.output
        doubled = output is not None and len(output) == 2 * self.shape[0]
        return output[: self.shape[0]] if doubled and output is not None else None
