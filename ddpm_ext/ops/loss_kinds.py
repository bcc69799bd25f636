"""The names of the losses and of their reductions, for the operator and for its twin in plain torch."""

from __future__ import annotations

from ddpm_ext.base import checks

__all__ = ["BOUNDS", "LOSSES", "REDUCTIONS", "check_options"]

LOSSES = ("mse", "l1", "huber")
BOUNDS = ("vlb", "rescaled_vlb")  # of the variational bound alone
REDUCTIONS = ("mean", "none", "sum")


def check_options(loss: str, delta: float, reduction: str) -> None:
    checks.one_of("loss", loss, LOSSES)
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.real("delta", delta)
    if not delta > 0:
        raise ValueError(f"delta is {delta}, expected delta > 0")
