"""Coefficients of the reverse and the forward process: float64 on the host, packed for the kernels on the device.

Every sampler and every parameterisation is a way to fill rows of one table:

    x0   = clip(a x + b m)                      predicted clean sample
    prev = c0 x0 + c1 x + c2 m + s z            next sample

with x the sample at a timestep, m the model's output, z a standard normal.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ddpm_ext import checks

__all__ = ["DeviceTables", "StepTable", "ddim_table", "ddpm_table", "prediction_coefficients", "spaced_timesteps"]

PREDICTIONS = ("eps", "x0", "v")
# Where alphas_cumprod is 0 (or all but) and the model predicts eps, x0 is the sign of x - m once it is clipped:
# a power of two near 1e30, so that both products are exact.
HUGE = 2.0**100


@dataclass(frozen=True, eq=False)
class StepTable:
    """The rows of a reverse process, in the order in which a loop takes them.

    Attributes:
        timestep: int64 (rows,), what the model is told, and the draw of the row's noise.
        a, b, c0, c1, c2, s: float64 (rows,).
    """

    timestep: Tensor
    a: Tensor
    b: Tensor
    c0: Tensor
    c1: Tensor
    c2: Tensor
    s: Tensor

    def __len__(self) -> int:
        return len(self.timestep)

    def packed(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The kernels' form, (rows, 8) on `device`: a, b, c0, c1, c2, s, the timestep's bits as an integer of the same
        width as `dtype` (float32, or float64 for the reference), and a zero."""
        table = torch.zeros(len(self), 8, dtype=dtype)
        for column, f in enumerate(fields(self)[1:]):
            table[:, column] = getattr(self, f.name)
        table.view(torch.int32 if dtype == torch.float32 else torch.int64)[:, 6] = self.timestep
        return table.to(device)


class DeviceTables:
    """Tables by name, in float32 and float64, made once on the CPU and copied once to each other device."""

    def __init__(self, steps: StepTable, **tables: Tensor) -> None:
        cpu = torch.device("cpu")
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        with torch.inference_mode(False):  # inference tensors could not be saved for a backward pass later on
            for dtype in (torch.float32, torch.float64):
                self._tables["steps", cpu, dtype] = steps.packed(cpu, dtype)
                for name, table in tables.items():
                    self._tables[name, cpu, dtype] = table.to(dtype, copy=True).contiguous()
            self._tables["timesteps", cpu, torch.int64] = steps.timestep.clone()

    def get(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        table = self._tables.get((name, device, dtype))
        if table is None:
            with torch.inference_mode(False):
                table = self._tables[name, torch.device("cpu"), dtype].to(device)
            # What a function transform or a fake mode made is of no use after it.
            if type(table) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(table):
                self._tables[name, device, dtype] = table
        return table

    def __getstate__(self) -> dict[str, object]:
        """Without the copies: they are made anew where they are unpickled."""
        return {"_tables": {key: table for key, table in self._tables.items() if key[1].type == "cpu"}}


def spaced_timesteps(timesteps: int, steps: int | None) -> Tensor:
    """`steps` timesteps of 0 ... timesteps - 1, evenly spaced with both ends (one step: the last), descending.

    Raises:
        TypeError, ValueError: `steps` is no int in [1, timesteps].
    """
    if steps is None:
        steps = timesteps
    stop_name = f"{timesteps + 1}, there being {timesteps} timesteps"
    steps = checks.integer("steps", steps, timesteps + 1, stop_name, start=1)
    if steps == 1:
        return torch.tensor([timesteps - 1])
    return torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64).round().long()


def prediction_coefficients(alphas_cumprod: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """a, b of x0 = a x + b m. eps: eq. (15) of Ho et al. 2020; v: section 4 of Salimans & Ho 2022."""
    if prediction == "x0":
        return torch.zeros_like(alphas_cumprod), torch.ones_like(alphas_cumprod)
    if prediction == "v":
        return alphas_cumprod.sqrt(), -(1 - alphas_cumprod).sqrt()
    a = alphas_cumprod.rsqrt()
    none = a > HUGE
    return torch.where(none, HUGE, a), torch.where(none, -HUGE, -(1 / alphas_cumprod - 1).sqrt())


def _eps_coefficients(alphas_cumprod: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """p, q of eps = p x + q m, the noise that an unclipped prediction implies."""
    if prediction == "eps":
        return torch.zeros_like(alphas_cumprod), torch.ones_like(alphas_cumprod)
    if prediction == "v":
        return (1 - alphas_cumprod).sqrt(), alphas_cumprod.sqrt()
    return (1 - alphas_cumprod).rsqrt(), -(alphas_cumprod / (1 - alphas_cumprod)).sqrt()


def _previous(alphas_cumprod: Tensor, timestep: Tensor) -> Tensor:
    """alphas_cumprod of the next timestep of a descending sequence, 1 after its last."""
    return torch.cat([alphas_cumprod[timestep[1:]], alphas_cumprod.new_ones(1)])


def ddpm_table(
    betas: Tensor, alphas_cumprod: Tensor, timestep: Tensor, *, prediction: str = "eps", variance: str = "fixed_small"
) -> StepTable:
    """Ancestral sampling over a descending subset of timesteps: the posterior q(x_prev | x_t, x_0).

    Ho et al. 2020, eq. (6), (7) and algorithm 2; over a subset with the betas of Nichol & Dhariwal 2021, section 4:
    beta = 1 - alphas_cumprod[t] / alphas_cumprod[prev].

    Args:
        betas, alphas_cumprod: float64 (timesteps,).
        timestep: int64 (rows,), descending.
        prediction: "eps", "x0" or "v".
        variance: "fixed_small" (the posterior's) or "fixed_large" (beta).
    """
    now, prev = alphas_cumprod[timestep], _previous(alphas_cumprod, timestep)
    beta = 1 - now / prev
    next_lower = torch.cat([timestep[1:], timestep.new_full((1,), -1)])
    beta = torch.where(timestep - next_lower == 1, betas[timestep], beta)  # neighbours: without a detour
    posterior_variance = beta * (1 - prev) / (1 - now)
    a, b = prediction_coefficients(now, prediction)
    s = (posterior_variance.clamp(min=1e-20) if variance == "fixed_small" else beta).sqrt()
    s[-1] = 0  # the last step adds no noise
    return StepTable(
        timestep=timestep,
        a=a,
        b=b,
        c0=beta * prev.sqrt() / (1 - now),
        c1=(1 - prev) * (1 - beta).sqrt() / (1 - now),
        c2=torch.zeros_like(a),
        s=s,
    )


def ddim_table(alphas_cumprod: Tensor, timestep: Tensor, *, prediction: str = "eps", eta: float = 0.0) -> StepTable:
    """DDIM over a descending subset of timesteps, keeping the model's own eps after x0 is clipped.

    Song et al. 2021, eq. (12), sigma from eq. (16).

    Args:
        alphas_cumprod: float64 (timesteps,).
        timestep: int64 (rows,), descending.
        prediction: "eps", "x0" or "v".
        eta: 0 for the deterministic sampler, 1 for DDPM's variance; >= 0.
    """
    now, prev = alphas_cumprod[timestep], _previous(alphas_cumprod, timestep)
    sigma = eta * ((1 - prev) / (1 - now)).sqrt() * (1 - now / prev).sqrt()
    direction = (1 - prev - sigma**2).clamp(min=0).sqrt()
    a, b = prediction_coefficients(now, prediction)
    p, q = _eps_coefficients(now, prediction)
    return StepTable(timestep=timestep, a=a, b=b, c0=prev.sqrt(), c1=direction * p, c2=direction * q, s=sigma)
