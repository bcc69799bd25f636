"""The names of the losses and reductions, for the operator and for its twin in plain torch."""

from __future__ import annotations

from ddpm_ext.base import checks

LOSSES = ("mse", "l1", "huber")
BOUNDS = ("vlb", "rescaled_vlb")  # losses that are the variational bound alone
REDUCTIONS = ("mean", "none", "sum")


def check_options(loss: str, delta: float, reduction: str, losses: tuple[str, ...] = LOSSES) -> None:
    """Raises TypeError or ValueError for a wrong option.

    For correct options no function is called, since a call in Python takes a notable part of a small loss's time.
    """
    if loss not in losses:
        checks.one_of("loss", loss, losses)
    if reduction not in REDUCTIONS:
        checks.one_of("reduction", reduction, REDUCTIONS)
    if type(delta) is not float:
        checks.real("delta", delta)
    if not delta > 0:
        raise ValueError(f"delta is {delta}, expected delta > 0")
