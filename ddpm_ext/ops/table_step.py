"""What a TableStep does, by calls of operators: in plain torch, and where torch.compile or torch.jit.trace records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.ops.noise import Philox

# What take computes beside the step, by the names of its arguments.
BOUND, SPREAD = ("quantile", "maximum"), ("guidance", "rescale")


def operators_by_name(*operators: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {operator.__name__: operator for operator in operators}


class CalledTableStep:
    """A TableStep that calls `operators`, functions by their names. See ops.fused.TableStep."""

    operators: ClassVar[dict[str, Callable[..., Any]]]
    run: Callable[..., Tensor] | None = None

    def __init__(
        self,
        table: Tensor,
        *,
        on_host: Tensor | None = None,
        clip: Clip | None = (-1.0, 1.0),
        noise: Tensor | None = None,
        rng: Philox | None = None,
        add_noise: bool = True,
        timesteps: object = None,
        model_output: object = None,
    ) -> None:
        checks.tensor("table", table)
        self._table = table
        checks.flag("add_noise", add_noise)
        self._given: dict[str, Any] = {"clip": clip, "noise": noise, "rng": rng, "add_noise": add_noise}

    def check(self, x_t: Tensor, row: Tensor | None, index: int, out: Tensor | None = None) -> None:
        """Where calls are recorded, their arguments are checked when they run."""

    def take(
        self,
        x_t: Tensor,
        model_output: Tensor | None,
        row: Tensor | None,
        index: int,
        out: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        t, call = index if row is None else row, self.operators
        inputs = {name: value for name, value in inputs.items() if value is not None}
        given = {**self._given, "out": out}
        if "noise" in inputs:
            given["noise"] = inputs.pop("noise")
        bound = {name: inputs.pop(name) for name in BOUND if name in inputs}
        spread = {name: inputs.pop(name) for name in SPREAD if name in inputs}
        if spread and (model_output is None or "uncond_output" not in inputs):
            missing = "model_output" if model_output is None else "uncond_output"
            raise ValueError(f"TableStep: rescale is given without {missing}, expected both")
        if spread:
            spread = {"guidance": 1.0, "rescale": 0.0} | spread
            inputs["output_scale"] = call["output_scale"](model_output, inputs["uncond_output"], **spread)
        if bound and "x_start" in inputs:
            inputs["x_start_scale"] = call["x_start_scale"](inputs["x_start"], **bound)
        elif bound:
            # not |=, which torch.compile of torch 2.7 does not take
            bound.update((name, inputs[name]) for name in ("uncond_output", "output_scale") if name in inputs)
            inputs["x_start_scale"] = call["x_start_scale"](x_t, model_output, self._table, t, **bound)
        if model_output is not None and not inputs:
            return call["reverse_step"](x_t, model_output, self._table, t, **given)
        return call["step_with_options"](x_t, model_output, self._table, t, **given, **inputs)
