"""Rows for other libraries' objects, made from the tables of their schedules, which are tensors of the objects.

No table is computed from another one, since numbers such as 1 - alphas_cumprod near t = 0 would lose digits in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_ext.integrations.fallback import Fallback
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.step_table import StepTable

TABLES = (  # the names of the tables that determine the rows
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def rows_of(tables: Mapping[str, Tensor], prediction: str, tables_name: str = "tables") -> KernelTables:
    """The rows of an object with these TABLES, and with its loss_weight if `tables` has it.

    - "steps": row t draws from q(x_{t-1} | x_t, x_0).
    - "q_sample": the weights of x_0 and of the noise in x_t.
    - "start": a and b of x_0 = a x_t + b m, with m the model's output.
    - "loss": the weights of x_0 and of the noise in the model's target, and the weight of the loss.

    Raises Fallback for numbers that are not finite.

    Args:
        prediction: ddpm_ext's name of the model's prediction: "eps", "x0" or "v".
        tables_name: the library's word for the tables, for the error's text.
    """
    in_float64 = {name: table.detach().to("cpu", torch.float64) for name, table in tables.items()}
    signal, noise = in_float64["sqrt_alphas_cumprod"], in_float64["sqrt_one_minus_alphas_cumprod"]
    zeros, ones = torch.zeros_like(signal), torch.ones_like(signal)
    (a, b), target = {
        "eps": ((in_float64["sqrt_recip_alphas_cumprod"], -in_float64["sqrt_recipm1_alphas_cumprod"]), (zeros, ones)),
        "x0": ((zeros, ones), (ones, zeros)),
        "v": ((signal, -noise), (-noise, signal)),
    }[prediction]
    deviation = (in_float64["posterior_log_variance_clipped"] / 2).exp()
    deviation[0] = 0  # the step from t = 0 is the last one, which adds no noise
    t = torch.arange(len(a), device="cpu")
    try:
        steps = StepTable(t, a, b, in_float64["posterior_mean_coef1"], in_float64["posterior_mean_coef2"], s=deviation)
    except ValueError as error:
        raise Fallback(f"its {tables_name} make no rows: {error}") from None
    return KernelTables(
        steps,
        q_sample=torch.stack([signal, noise], 1),
        start=torch.stack([a, b], 1),
        loss=torch.stack([*target, in_float64.get("loss_weight", ones), zeros], 1),
    )
