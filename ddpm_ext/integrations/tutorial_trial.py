"""Tests whether the methods of a class that resembles the tutorial's have the same results as the rows of its tables.

A method runs on batches of the caller's shape and device at some timesteps, and on a single sample at every timestep.
Both are needed because notebooks have many variations of the class: a variation may scale a single channel, depend on
the size of its samples, or change its guidance for a few timesteps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_ext import ops
from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.integrations.peer_tables import TABLES, rows_of
from ddpm_ext.integrations.proof import Generators, changed, contents
from ddpm_ext.ops.row import row_numbers
from ddpm_ext.tables.on_device import KernelTables

# The largest difference, relative to the size of the terms. float32 sums of the terms in any order differ by less.
TOLERANCE = 1e-5
# The factors of the samples. Batches of a trial of p_sample take the two pairs in turn, those of a training method the
# second pair; a single sample takes only the first factor of a pair. With -1/256, no predicted clean sample is clipped,
# except at timesteps with hardly any signal.
SCALES = ((1.0, -1 / 256), (-1.0, 4.0))
GradMode = Callable[[], AbstractContextManager[Any]]


def checked_rows(tables: Mapping[str, Any]) -> KernelTables:
    """The rows made from an object's tables. Raises Fallback if the tables are not vectors like the tutorial's."""
    needed = {name: tables[name] for name in TABLES}
    shape = getattr(needed[TABLES[0]], "shape", ())
    for name, table in needed.items():
        if not isinstance(table, Tensor) or table.dtype not in (torch.float32, torch.float64):
            raise Fallback(f"its {name} is no tensor of float32 or float64")
        if table.shape != shape or table.dim() != 1:
            raise Fallback(f"its {name} has shape {tuple(table.shape)}, no number a timestep")
    return rows_of(needed, "eps")


def copied(x: Any) -> Any:
    """A copy of x and of the containers and tensors in it, so that a trial does not write to the caller's objects."""
    if isinstance(x, dict):
        return type(x)({key: copied(value) for key, value in x.items()})
    if isinstance(x, list):
        return [copied(value) for value in x]
    return copy.copy(x) if isinstance(x, set | np.ndarray) else x.detach().clone() if isinstance(x, Tensor) else x


@torch.enable_grad()
def try_step(trial_object: Any, rows: KernelTables, shape: Sequence[int], device: torch.device, clip: bool) -> GradMode:
    """Tries the object's p_sample at each timestep, most of them with one sample.

    Returns the grad mode in which p_sample runs its code: with gradients or without. Raises Fallback if its results
    differ from those of the rows, or if it writes attributes.
    """
    count, last = len(rows), len(rows) - 1
    ends = sorted({0, 1, count // 2, last - 1, last} & set(range(count)))
    times = [torch.full(shape[:1], t, device=device) for t in ends]
    samples = torch.arange(shape[0], device=device)
    times.append(samples * max(1, last // max(1, shape[0] - 1)) % count)  # the samples have different timesteps
    times += torch.arange(count, device=device)[:, None]  # all timesteps, each with a single sample
    trial = _Trial(trial_object, device)
    table = rows.get("steps", device, torch.float32)
    for i, t in enumerate(times):
        scales = SCALES[i % 2] if i <= len(ends) else SCALES[i % 2][:1]
        for x in trial.samples((len(t), *shape[1:]), *scales):
            m, z = trial.drawn(x, t)
            row = row_numbers(table.abs(), t, x, table.dtype)
            size = row.c0 * (row.a * x.abs() + row.b * m.abs()) + row.c1 * x.abs() + 5 * row.s
            expected = ops.reverse_step(x, m, table, t, clip=(-1.0, 1.0) if clip else None, noise=z)
            result = trial.call("p_sample", trial.model, x.clone(), t, clip_denoised=clip)
            _compare("p_sample", result, expected, size, t)
    trial.check_state("p_sample")
    if result.is_inference():
        return torch.inference_mode
    return nullcontext if result.requires_grad else torch.no_grad


@torch.enable_grad()
def try_training(
    trial_object: Any, rows: KernelTables, method: str, shape: Sequence[int], device: torch.device
) -> GradMode:
    """Tries q_sample or train_losses. Raises Fallback if it differs from the rows or writes attributes.

    Returns nullcontext: in training, the caller's grad mode counts.
    """
    trial, ascending = _Trial(trial_object, device), torch.arange(shape[0], device=device) % len(rows)
    batches = [ascending, len(rows) - 1 - ascending]
    batches += torch.arange(len(rows), device=device)[:, None]  # all timesteps, each with a single sample
    for i, t in enumerate(batches):
        for x in trial.samples((len(t), *shape[1:]), *SCALES[1] if i < 2 else SCALES[1][:1]):
            trial.rewind()
            z = torch.randn_like(x)
            with torch.no_grad():
                noisy = ops.forward_process(x, rows.get("q_sample", device, torch.float32), t, noise=z)
                if method == "q_sample":
                    for noise in ((), (z,)):
                        _compare(method, trial.call(method, x, t, *noise), noisy, x.abs() + 5, t)
                    continue
                table = rows.get("loss", device, torch.float32)
                m = trial.model(noisy, t)
                loss = ops.diffusion_loss(m, None, table, t, noise=z)
            # _compare allows rounding errors in proportion to `size`. For a batch (i < 2), the loss serves as size. For
            # a single small sample, m and z may nearly cancel: the loss, the mean of (m - z)^2, is then far smaller
            # than the terms from which its rounding errors come.
            size = loss if i < 2 else ((m - z).abs() * (m.abs() + z.abs())).mean()
            _compare(method, trial.call(method, trial.model, x, t), loss, size, t)
    trial.check_state(method)
    return nullcontext


class _Probe(nn.Module):
    """A model with a parameter, for trials.

    It draws a random number, so that a step that draws its noise before the model's call, unlike the tutorial's, gets
    other noise and fails the trial.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5, device=device))

    def forward(self, x: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
        torch.rand((), device=x.device)
        return x.flip(-1) + (self.weight + 0.3 * t.sin().reshape(-1, *[1] * (x.dim() - 1))) * x


class _Trial:
    """Calls an object's methods, each from the same state of torch's generators, so that all draw the same noise."""

    def __init__(self, trial_object: Any, device: torch.device) -> None:
        self.model = _Probe(device)
        self._trial_object, self._device, self._before = trial_object, device, contents(vars(trial_object))
        self._generators, self._noise_generator = Generators(device), torch.Generator("cpu").manual_seed(0)
        self.rewind = self._generators.rewind

    def samples(self, shape: Sequence[int], *scales: float) -> list[Tensor]:
        normal = torch.randn(tuple(shape), generator=self._noise_generator, device="cpu").to(self._device)
        return [scale * (normal + 0.5) for scale in scales]

    def call(self, name: str, *args: Any, **options: Any) -> Tensor:
        """The result of the object's method. Raises Fallback if the method raises an error or returns no tensor."""
        self.rewind()
        try:
            result = getattr(self._trial_object, name)(*args, **options)
        except Exception as error:  # a user's code may raise anything
            raise Fallback(f"its {name} raises {type(error).__name__}: {error}") from None
        finally:
            self.rewind()
        if not isinstance(result, Tensor):
            raise Fallback(f"its {name} gives a {type(result).__name__}")
        return result

    @torch.no_grad()
    def drawn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The model's output, and the noise that a step draws after its call of the model."""
        self.rewind()
        return self.model(x, t), torch.randn_like(x)

    def check_state(self, name: str) -> None:
        stores = changed(self._before, vars(self._trial_object))
        if stores:
            raise Fallback(f"its {name} stores {', '.join(stores)}")


def _compare(name: str, result: Tensor, row_result: Tensor, size: Tensor, t: Tensor) -> None:
    """Raises Fallback if a result differs from the rows' result by more than the rounding of terms of this size."""
    if result.shape != row_result.shape or result.dtype != row_result.dtype:
        raise Fallback(f"its {name} gives {result.dtype} of shape {tuple(result.shape)}")
    expected, actual = row_result.flatten(), result.detach().flatten()
    wrong = ~((actual - expected).abs() <= TOLERANCE * size.flatten())  # NaN is wrong
    if wrong.any():
        i = int(wrong.nonzero()[0])
        timestep_text = f" at t = {int(t[i * len(t) // len(wrong)])}" if len(wrong) > 1 else ""
        raise Fallback(f"its {name} gives {actual[i]:.6g}{timestep_text}, where the tutorial's gives {expected[i]:.6g}")
