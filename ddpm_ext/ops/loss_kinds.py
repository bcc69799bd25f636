"""The names of the losses and reductions, for the operator and for its twin in plain torch."""

from __future__ import annotations

from ddpm_ext.base import checks

LOSSES = ("mse", "l1", "huber")
BOUNDS = ("vlb", "rescaled_vlb")  # losses that are the variational bound alone
REDUCTIONS = ("mean", "none", "sum")


def check_options(loss: str, delta: float, reduction: str, losses: tuple[str, ...] = LOSSES) -> None:
    """Raises TypeError and ValueError for wrong options.

    Correct options are recognised without a call: each call takes as long as a check of the compiled module.
    """
    if loss not in losses:
        checks.one_of("loss", loss, losses)
    if reduction not in REDUCTIONS:
        checks.one_of("reduction", reduction, REDUCTIONS)
    if type(delta) is not float:
        checks.real("delta", delta)
    if not delta > 0:
        raise ValueError(f"delta is {delta}, expected delta > 0")
