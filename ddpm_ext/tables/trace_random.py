"""A sampler's own loop on random numbers, by which its rows are proven."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext.tables.trace_run import Run, Step

Array = npt.NDArray[np.float64]

BATCH = 48  # random samples
LINEAR = 1e-10  # the largest relative residual of a step
ROUNDED = 1e-5  # the same where a sampler computes in float32, whatever it is given


class RandomRun(NamedTuple):
    """A loop on random numbers: x and m are (steps, batch), the draws of each step (draws, batch)."""

    x: Array
    m: Array
    z: list[Array]
    prev: Array
    second: list[Array | None]
    steps: list[Step]

    @classmethod
    def of(cls, run: Run, seed: int, *, follows: bool = True) -> RandomRun:
        """A loop; where a step's samples are not to follow from the step before, they are random in each."""
        generator = torch.Generator().manual_seed(seed)

        def normal() -> Tensor:
            return torch.empty(BATCH, *[1] * (run.dims - 1), dtype=torch.float64, device="cpu").normal_(
                generator=generator
            )

        # Twice as large as a clip's range, so that predicted clean samples are clipped here and there.
        size = 2 * max(1.0, run.clip)
        outputs = [size * normal() for _ in run.times]
        inputs: list[Tensor] = []

        def sample(i: int, prev: Tensor | None) -> Tensor:
            inputs.append(prev.double() if follows and prev is not None else size * normal())
            return inputs[-1].clone()

        steps = run.observe(sample, lambda i: outputs[i].clone(), normal)
        z = [np.array([flat(drawn) for drawn, _ in step.draws]).reshape(-1, BATCH) for step in steps]
        return cls(
            np.array([flat(x) for x in inputs]),
            np.array([flat(m) for m in outputs]),
            z,
            np.array([flat(step.result.prev) for step in steps]),
            [None if step.result.second is None else flat(step.result.second) for step in steps],
            steps,
        )

    def noise(self, i: int, draw: int | None) -> Array:
        """(batch,), a draw of step i; zeros for None."""
        return np.zeros(BATCH) if draw is None else self.z[i][draw]

    def bound(self) -> float:
        """How far from linear a step may be."""
        wide = all(step.result.prev.dtype == torch.float64 for step in self.steps)
        return LINEAR if wide else ROUNDED


def flat(x: Tensor) -> Array:
    if x.numel() != len(x):
        raise ValueError(f"a step returns a tensor of shape {tuple(x.shape)} for samples of one number each")
    return x.detach().double().reshape(-1).numpy()


def relative(error: Array, parts: Array) -> float:
    """The largest error, relative to the sum of its parts' sizes. A NaN counts as infinite."""
    size = max(float(parts.max()), 1e-300)
    worst = float(error.max()) / size
    return worst if np.isfinite(worst) else float("inf")
