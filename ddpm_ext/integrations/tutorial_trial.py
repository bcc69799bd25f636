"""Whether a class that resembles the tutorial's does the same: its methods run beside the rows of its tables.

A step is compared at every timestep, on samples of several sizes, signs and scales, so that none passes that reads more
than the element it writes: a norm, a mean, a neighbour, the number of pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_ext import ops
from ddpm_ext.integrations.fallback import Fallback, attempt
from ddpm_ext.integrations.own_tables import TABLES, rows_of
from ddpm_ext.integrations.shared import new
from ddpm_ext.ops.row import row_numbers
from ddpm_ext.tables.on_device import KernelTables

TOLERANCE = 1e-5  # relative to the terms of a sum in float32, added in any order
SIZES = ((3, 2, 2), (2, 3, 4), (4, 2, 3), (2, 5, 2))  # channels, height and width
SCALES = (1.0, -1.0, 4.0, -1 / 256)  # with the smallest, no predicted clean sample is clipped
ENDS = 3  # steps at each end of a loop


class FusedMethods(NamedTuple):
    """What an object's tables give, after its methods were tried.

    Attributes:
        tables: the rows.
        differs: of each method but p_sample, how it differs from the tutorial's, or None where it doesn't.
        grad_mode: the mode in which the object's p_sample runs: with gradients or without.
    """

    tables: KernelTables
    differs: Mapping[str, str | None] = {}
    grad_mode: Callable[[], AbstractContextManager[Any]] = nullcontext

    def rows(self, name: str, x: Tensor) -> Tensor:
        return self.tables.get(name, x.device, torch.float32)


@torch.enable_grad()
def try_methods(plain: Any, tables: Mapping[str, Any]) -> FusedMethods:
    """What an object of the class gives. Raises Fallback where nothing is fused.

    Args:
        plain: the object, with the methods of its own class.
        tables: the object's.
    """
    own = {name: tables[name] for name in TABLES}
    shape = getattr(own[TABLES[0]], "shape", ())
    for name, table in own.items():
        if not isinstance(table, Tensor) or table.dtype not in (torch.float32, torch.float64):
            raise Fallback(f"its {name} is no tensor of float32 or float64")
        if table.shape != shape or table.dim() != 1:
            raise Fallback(f"its {name} has shape {tuple(table.shape)}, no number a timestep")
    fused, device = FusedMethods(rows_of(own, "eps")), own[TABLES[0]].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the generators stay as they were
        trial, batches = _Trial(plain, fused, device), list(_batches(len(fused.tables), device))
        samples = [trial.steps(*batch) for batch in batches if batch[0].numel()]
        calls = [call for x, t, _ in batches if len(x) <= 2 * ENDS for call in zip(x, t, strict=True)]
        differs = {name: trial.difference(name, calls) for name in ("q_sample", "train_losses")}
    grad_mode = nullcontext if samples[0].requires_grad else torch.no_grad
    return FusedMethods(fused.tables, differs, torch.inference_mode if samples[0].is_inference() else grad_mode)


def _batches(timesteps: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Samples (calls, batch, channels, height, width), their timesteps (calls, batch), and whether x_0 is clipped.

    A call's samples have timesteps of their own in the first two, as in training, and one timestep in all others.
    """
    generator, every = torch.Generator("cpu").manual_seed(0), torch.arange(timesteps, device="cpu")

    def batch(t: Tensor, size: Sequence[int], scale: float, clip: bool) -> tuple[Tensor, Tensor, bool]:
        x = scale * (torch.randn(*t.shape, *size, generator=generator, device="cpu") + 0.5)
        return x.to(device), t.to(device), clip

    for clip in (True, False):  # each sample at a timestep of its own
        yield batch(every[None], SIZES[0], 1.0, clip)
    ends = torch.cat([every[:ENDS], every[ENDS:][-ENDS:]])[:, None].expand(-1, 2)
    for size, scale, clip in itertools.product(SIZES, SCALES, (True, False)):
        yield batch(ends, size, scale, clip)
    for k, size in enumerate(SIZES):  # each timestep with two sizes, of which one has the other sign
        t = every[k % 2 :: 2, None].expand(-1, 2)
        yield batch(t, size, 1.0 if k < 2 else -1.0, True)


def attributes_read(peer: type, state: Mapping[str, Any], table: Any) -> tuple[str, ...]:
    """The names of the attributes, such as a temperature, that an object's p_sample and train_losses read.

    Args:
        peer: the object's own class.
        state: its attributes.
        table: one of its tables.
    """
    found: dict[str, None] = {}

    def read(self: Any, name: str) -> Any:
        if name in state:
            found[name] = None
        return object.__getattribute__(self, name)

    spy = new(type(peer)(peer.__name__, (peer,), {"__getattribute__": read}))
    spy.__dict__.update(state)
    found.clear()
    with suppress(Exception), torch.random.fork_rng(devices=[table.device] if table.is_cuda else []):  # anybody's code
        x, t, _ = next(_batches(len(table), table.device))
        for name in ("p_sample", "train_losses"):
            getattr(spy, name)(_Probe(table.device), x[0], t[0])
    return tuple(found)


class _Probe(nn.Module):
    """A model with a parameter. It draws a number before it returns, so that the order of draws shows."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5, device=device))

    def forward(self, x: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
        torch.rand((), device=x.device)
        return x.flip(-1) + (self.weight + 0.3 * t.sin().reshape(-1, *[1] * (x.dim() - 1))) * x


class _Trial:
    """Calls of an object's methods, each from the same state of torch's generators, beside what its rows give."""

    def __init__(self, plain: Any, fused: FusedMethods, device: torch.device) -> None:
        self.plain, self.fused, self.model = plain, fused, _Probe(device)
        self._device, self._state = device, torch.get_rng_state()
        self._card_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _rewind(self) -> None:
        torch.set_rng_state(self._state)
        if self._card_state is not None:
            torch.cuda.set_rng_state(self._card_state, self._device)

    def _own(self, name: str, *args: Any, **options: Any) -> Tensor:
        """What the object's method gives. Raises Fallback for an error of its code."""
        self._rewind()
        try:
            found = getattr(self.plain, name)(*args, **options)
            found = found[0] if name == "p_mean_variance" else found
        except Exception as error:  # anybody's code
            raise Fallback(f"its {name} raises {type(error).__name__}: {error}") from None
        if not isinstance(found, Tensor):
            raise Fallback(f"its {name} gives a {type(found).__name__}")
        return found

    @torch.no_grad()
    def _drawn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The model's output and the noise that a step draws after it."""
        self._rewind()
        return self.model(x, t), torch.randn_like(x)

    def steps(self, x: Tensor, t: Tensor, clip: bool) -> Tensor:
        """What p_sample gives in the last call. Raises Fallback where it differs from the rows."""
        calls, rows = list(zip(x, t, strict=True)), self.fused.rows("steps", x)
        m, z = (torch.cat(each) for each in zip(*(self._drawn(*call) for call in calls), strict=True))
        x, t = x.flatten(0, 1), t.flatten()
        row = row_numbers(rows.abs(), t, x, rows.dtype)
        size = row.c0 * (row.a * x.abs() + row.b * m.abs()) + row.c1 * x.abs() + 5 * row.s
        sources: dict[str, dict[str, Any]] = {"p_mean_variance": {"add_noise": False}, "p_sample": {"noise": z}}
        if len(calls) > 1:  # the mean alone is compared once, for the reason that it gives
            del sources["p_mean_variance"]
        for name, source in sources.items():
            expected = ops.reverse_step(x, m, rows, t, clip=(-1.0, 1.0) if clip else None, **source)
            found = [self._own(name, self.model, *call, clip_denoised=clip) for call in calls]
            _compare(name, found, expected.reshape(len(calls), -1, *x.shape[1:]), size, t)
        return found[-1]

    def difference(self, name: str, calls: Sequence[tuple[Tensor, Tensor]]) -> str | None:
        """How a method of training differs from the tutorial's; None where it doesn't. calls: samples and timesteps."""
        for call in calls:
            found = attempt(partial(self._train, name), *call)
            if isinstance(found, Fallback):
                return found.reason
        return None

    def _train(self, name: str, x: Tensor, t: Tensor) -> None:
        """Raises Fallback where a method of training differs from the rows."""
        self._rewind()
        z = torch.randn_like(x)
        with torch.no_grad():
            noisy = ops.forward_process(x, self.fused.rows("q_sample", x), t, noise=z)
            if name == "q_sample":
                for noise in ((), (z,)):
                    _compare(name, [self._own(name, x, t, *noise)], noisy[None], x.abs() + 5, t)
                return
            loss = ops.diffusion_loss(self.model(noisy, t), None, self.fused.rows("loss", x), t, noise=z)
        _compare(name, [self._own(name, self.model, x, t)], loss[None], loss, t)


def _compare(name: str, found: Sequence[Tensor], expected: Tensor, size: Tensor, t: Tensor) -> None:
    """Raises Fallback where results of calls differ by more than the rounding of terms of a size.

    t: of each sample, in all calls.
    """
    for each, of_rows in zip(found, expected, strict=True):
        if each.shape != of_rows.shape or each.dtype != of_rows.dtype:
            raise Fallback(f"its {name} gives {each.dtype} of shape {tuple(each.shape)}")
    ours, theirs = expected.flatten(), torch.stack([*found]).detach().flatten()
    wrong = ~((theirs - ours).abs() <= TOLERANCE * size.flatten())  # NaN is wrong
    if wrong.any():
        at = int(wrong.nonzero()[0])
        where = f" at t = {int(t[at * len(t) // len(wrong)])}" if len(wrong) > 1 else ""
        gives, wanted = theirs[at].item(), ours[at].item()
        raise Fallback(f"its {name} gives {gives:.6g}{where}, where the tutorial's gives {wanted:.6g}")
