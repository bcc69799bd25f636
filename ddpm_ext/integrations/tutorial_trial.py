"""Whether a class that resembles the tutorial's does the same: each method runs beside the fused one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_ext import ops
from ddpm_ext.integrations.fallback import Fallback, attempt
from ddpm_ext.integrations.own_tables import TABLES, rows_of
from ddpm_ext.ops.row import row_numbers
from ddpm_ext.tables.on_device import KernelTables

TOLERANCE = 1e-5  # relative to the terms of a sum in float32, added in any order


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


class _Probe(nn.Module):
    """A model with a parameter. It draws a number before it returns, so that the order of draws shows."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5, device=device))

    def forward(self, x: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
        torch.rand((), device=x.device)
        return x.flip(-1) + self.weight * x + (t / 1000).reshape(-1, *[1] * (x.dim() - 1))


@torch.enable_grad()
def try_methods(plain: Any, fast: Any, tables: Mapping[str, Any]) -> FusedMethods:
    """What an object of the class gives. Raises Fallback where nothing is fused.

    Args:
        plain, fast: the object as its own class has it, and an accelerated one, which is written to.
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
    devices = [device] if device.type == "cuda" else []  # whose generators are left as they were
    # Three numbers at each timestep.
    t, model = torch.arange(len(fused.tables), device=device), _Probe(device)
    numbers = torch.randn(2, len(t), 1, 1, 3, generator=torch.Generator().manual_seed(0), device="cpu")
    x, z = numbers.to(device).unbind(0)
    steps = fused.rows("steps", x)

    def mean(model: Any, x: Tensor, t: Tensor, clip_denoised: bool) -> tuple[Tensor]:
        clip = (-1.0, 1.0) if clip_denoised else None
        return (ops.reverse_step(x, model(x, t), steps, t, clip=clip, add_noise=False),)

    fast.__dict__.update(_fused_methods=lambda: fused, p_mean_variance=mean)

    def result(name: str, *args: Any, size: Tensor | None = None, **options: Any) -> Tensor:
        """Of the class's own method. Raises Fallback where the fused one's is another."""

        def call(gd: Any) -> Any:
            with torch.random.fork_rng(devices=devices):  # both draw the same numbers
                found = getattr(gd, name)(*args, **options)
                return found[0] if name == "p_mean_variance" else found

        with torch.no_grad():
            expected = call(fast)
        try:
            found = call(plain)
            _compare(name, found, expected, expected.abs() if size is None else size, len(t))
        except Fallback:
            raise
        except Exception as error:  # anybody's code
            raise Fallback(f"its {name} raises {type(error).__name__}: {error}") from None
        return found

    def difference(name: str, *args: Any, size: Tensor | None = None) -> str | None:
        found = attempt(partial(result, size=size), name, *args)
        return found.reason if isinstance(found, Fallback) else None

    row = row_numbers(steps.abs(), t, x, steps.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        m = model(x, t)
    size = row.c0 * (row.a * x.abs() + row.b * m.abs()) + row.c1 * x.abs() + 5 * row.s
    for clip in (True, False):
        result("p_mean_variance", model, x, t, clip_denoised=clip, size=size)
        sample = result("p_sample", model, x, t, clip_denoised=clip, size=size)
    grad_mode = nullcontext if sample.requires_grad else torch.no_grad
    differs = {
        "q_sample": difference("q_sample", x, t, size=x.abs() + 5) or difference("q_sample", x, t, z, size=x.abs() + 5),
        "train_losses": difference("train_losses", model, x, t),
    }
    return FusedMethods(fused.tables, differs, torch.inference_mode if sample.is_inference() else grad_mode)


def _compare(name: str, found: Tensor, expected: Tensor, size: Tensor, timesteps: int) -> None:
    """Raises Fallback where results differ by more than the rounding of terms of a size."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise Fallback(f"its {name} gives {found.dtype} of shape {tuple(found.shape)}")
    wrong = ~((found.detach() - expected).abs() <= TOLERANCE * size).flatten()  # NaN is wrong
    if wrong.any():
        at = int(wrong.nonzero()[0])
        where = f" at t = {at * timesteps // len(wrong)}" if expected.dim() else ""
        gives, wanted = (y.flatten()[at].item() for y in (found, expected))
        raise Fallback(f"its {name} gives {gives:.6g}{where}, where the tutorial's gives {wanted:.6g}")
