"""The loops that tuning runs: one model with its options, from the same noise each time."""

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
    """The model, its calls counted, and its last output kept. on_call: called after each."""

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
    """The samples of one batch. noise: what they begin with, before it has the first level's deviation."""

    loops: Loops
    rng: Philox
    noise: Tensor


class Loops:
    """Sampling loops of a model that differ in their tables alone.

    Args:
        diffusion, model, shape: as p_sample_loop's; shape is that of a batch.
        device: as p_sample_loop's.
        rng: seed and first sample id; each batch has the ids after those of the one before.
        options: others of p_sample_loop, of all loops.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range, or a model that returns its variance.
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
        first = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
        self.device = checks.device(device or (torch.device("cpu") if first is None else first.device))
        seed, ids = rng.seed_and_ids()
        if isinstance(seed, Tensor) or isinstance(ids, Tensor):
            raise ValueError(f"rng is {rng}, expected a seed and a first sample id that are ints")
        self._seed, self._first_id = seed, ids

    def batch(self, number: int) -> Batch:
        """Batch `number` of this rng's samples: ids number * shape[0] and on after the rng's own."""
        rng = Philox(self._seed, self._first_id + number * self.shape[0])
        noise = self.diffusion.ops.randn(self.shape, rng.of(STREAM_START, 0), device=self.device)
        return Batch(self, rng, noise)

    def samples(self, table: StepTable, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
        """A loop's last samples, which are kept in `dtype` between steps; the model has its own input all the same."""
        return self.run(table, rng=batch.rng, device=self.device, dtype=dtype)

    def run(self, table: StepTable, dtype: torch.dtype = torch.float32, **start: Any) -> Tensor:
        """The last samples of a loop. start: what it begins from, as options of p_sample_loop."""
        options: dict[str, Any] = {**self.options, "dtype": dtype, **start}
        own = options.get("input_dtype") or torch.float32

        def model(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.model(x.to(own), *args, **kwargs).to(dtype)

        if dtype is not torch.float32:
            options["input_dtype"] = None
        called = self.model if dtype is torch.float32 else model
        drawn = self.diffusion.p_sample_loop(called, self.shape, sampler=table, **options)
        assert isinstance(drawn, Tensor)  # with record="last"
        return drawn

    def fails(self, table: StepTable, batch: Batch) -> bool:
        """Whether a loop with this table ends in an error, as of a model that looks timesteps up, at those between."""
        try:
            self.samples(table, batch)
        except Exception:  # the model's code may raise anything
            return True
        return False

    def unconditional(self) -> Tensor | None:
        """The model's unconditional output in the last step; None where there was no guidance by a doubled batch."""
        output = self.model.output
        doubled = output is not None and len(output) == 2 * self.shape[0]
        return output[: self.shape[0]] if doubled and output is not None else None
