"""The loops that tuning runs: one model with its options, from the same noise each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.loop.guidance import Guidance, as_guidance
from ddpm_ext.ops.noise import STREAM_START, Philox
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.process.model_output import unwrap
from ddpm_ext.tables.step_table import StepTable


class CountedModel:
    """The model, its calls counted, and its last output kept. on_call: called after each."""

    def __init__(self, model: Model) -> None:
        self.model, self.calls, self.on_call = model, 0, lambda: None
        self.output: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.output = unwrap(self.model(*args, **kwargs))
        self.calls += 1
        self.on_call()
        return self.output


@dataclass(frozen=True)
class Batch:
    """The samples of one batch. noise: what their loops begin with, before it has the first level's deviation."""

    rng: Philox
    noise: Tensor


class Loops:
    """Sampling loops of a model that differ in their tables alone.

    Args:
        diffusion, model, shape: as p_sample_loop's; shape is that of a batch.
        guidance, clip_denoised, model_kwargs, device: as p_sample_loop's, of all loops.
        rng: seed and first sample id; each batch has the ids after those of the one before.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range, or a model that returns its variance.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        model: Model,
        shape: tuple[int, ...],
        *,
        guidance: Guidance | float | None = None,
        clip_denoised: bool | Clip | DynamicThreshold = True,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        rng: Philox,
    ) -> None:
        if diffusion.variance_entry.learned:
            raise ValueError(
                f"diffusion has the variance {diffusion.variance!r}, expected a fixed one: tuned steps add no noise, "
                "so that a learned variance would have no meaning"
            )
        self.diffusion, self.model = diffusion, CountedModel(model)
        self.shape = checks.shape(shape, least=1)
        self.options: dict[str, Any] = {
            "guidance": as_guidance(guidance),
            "clip_denoised": clip_denoised,
            "model_kwargs": model_kwargs,
            "record": "last",
            "progress": False,
        }
        first = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
        self.device = checks.device(device or (torch.device("cpu") if first is None else first.device))
        seed, ids = rng.seed_and_ids()
        if isinstance(seed, Tensor) or isinstance(ids, Tensor):
            raise ValueError(f"rng is {rng}, expected a seed and a first sample id that are ints")
        self._seed, self._first_id = seed, ids

    @property
    def guidance(self) -> Guidance | None:
        return self.options["guidance"]

    def batch(self, number: int) -> Batch:
        """Batch `number` of this rng's samples: ids number * shape[0] and on after the rng's own."""
        rng = Philox(self._seed, self._first_id + number * self.shape[0])
        noise = self.diffusion.ops.randn(self.shape, rng.of(STREAM_START, 0), device=self.device)
        return Batch(rng, noise)

    def samples(self, table: StepTable, batch: Batch) -> Tensor:
        """A loop's last samples."""
        return self.run(table, rng=batch.rng, device=self.device)

    def run(self, table: StepTable, **start: Any) -> Tensor:
        """The last samples of a loop. start: what it begins from, as options of p_sample_loop."""
        drawn = self.diffusion.p_sample_loop(self.model, self.shape, sampler=table, **self.options, **start)
        assert isinstance(drawn, Tensor)  # with record="last"
        return drawn

    def unconditional(self) -> Tensor | None:
        """The model's unconditional output in the last step; None where there was no guidance by a doubled batch."""
        output = self.model.output
        doubled = output is not None and len(output) == 2 * self.shape[0]
        return output[: self.shape[0]] if doubled and output is not None else None


def errors(samples: Tensor, truth: Tensor) -> Tensor:
    """How far each sample is from the truth, float64 (batch,) on the CPU: the root of the mean square of a sample's
    differences, in the samples' units."""
    return (samples.double() - truth.double()).flatten(1).square().mean(1).sqrt().cpu()
