"""CalledTableStep, the base class of the TableStep of ops.fused and of its twin in `reference`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.ops.noise import Philox
from ddpm_ext.ops.step_inputs import STEP_INPUTS, InputKind

# Numbers that `take` accepts: it computes x_start_scale from the first two, and output_scale from the last two.
NUMBERS = ("quantile", "maximum", "guidance", "rescale")
# {name of an input of `take`: the function that checks its type}
CHECKS: dict[str, Callable[[str, Any], object]] = {
    "noise": checks.tensor,
    **{name: checks.flag if kind is InputKind.FLAG else checks.tensor for name, kind in STEP_INPUTS.items()},
    **dict.fromkeys(NUMBERS, checks.real),
}


def operators_by_name(*operators: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {operator.__name__: operator for operator in operators}


class CalledTableStep:
    """Takes the steps of one table. ops.fused.TableStep describes the arguments and methods.

    Attributes:
        operators: {name: operator} of the operators that the methods call, which differ between subclasses.
    """

    operators: ClassVar[dict[str, Callable[..., Any]]]

    def __init__(
        self,
        table: Tensor,
        *,
        on_host: Tensor | None = None,
        clip: Clip | None = (-1.0, 1.0),
        noise: Tensor | None = None,
        rng: Philox | None = None,
        add_noise: bool = True,
    ) -> None:
        checks.tensor("table", table)
        self._table = table
        checks.flag("add_noise", add_noise)
        self._arguments: dict[str, Any] = {"clip": clip, "noise": noise, "rng": rng, "add_noise": add_noise}

    def check(self, x_t: Tensor, row: Tensor | None, index: int, out: Tensor | None = None) -> None:
        """Does nothing here, since the operators check their arguments. Subclasses check before a model is called."""

    def take(
        self,
        x_t: Tensor,
        model_output: Tensor | None,
        row: Tensor | None,
        index: int,
        out: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        if inputs:
            inputs = self._with_scales(x_t, model_output, index if row is None else row, inputs)
        return self._launch(x_t, model_output, row, index, out, inputs.pop("noise", None), inputs)

    def _with_scales(
        self, x_t: Tensor, model_output: Tensor | None, t: int | Tensor, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The inputs that are not None, with the factors x_start_scale and output_scale in place of NUMBERS."""
        tensors: dict[str, Any] = {}
        numbers: dict[str, float] = {}
        call = self.operators
        for name, value in inputs.items():
            if name not in CHECKS:
                raise TypeError(f"TableStep: unknown input {name}, expected one of {', '.join(CHECKS)}")
            if value is not None:
                CHECKS[name](name, value)
                (numbers if name in NUMBERS else tensors)[name] = value
        uncond = tensors.get("uncond_output")
        if "guidance" in numbers or "rescale" in numbers:
            if model_output is None or uncond is None:
                option = "guidance" if "guidance" in numbers else "rescale"
                missing = "model_output" if model_output is None else "uncond_output"
                raise ValueError(f"TableStep: {option} is given without {missing}, expected both")
            spread = {"guidance": numbers.get("guidance", 1.0), "rescale": numbers.get("rescale", 0.0)}
            tensors["output_scale"] = call["output_scale"](model_output, uncond, **spread)
        if "quantile" in numbers or "maximum" in numbers:
            # A missing quantile becomes 0, which the operator rejects.
            bound = {"quantile": numbers.get("quantile", 0.0), "maximum": numbers.get("maximum", math.inf)}
            if "x_start" in tensors:
                scale = call["x_start_scale"](tensors["x_start"], **bound)
            else:
                guidance = {"uncond_output": uncond, "output_scale": tensors.get("output_scale")}
                scale = call["x_start_scale"](x_t, model_output, self._table, t, **bound, **guidance)
            tensors["x_start_scale"] = scale
        return tensors

    def _launch(
        self,
        x_t: Tensor,
        model_output: Tensor | None,
        row: Tensor | None,
        index: int,
        out: Tensor | None,
        noise: Tensor | None,
        inputs: dict[str, Any],
    ) -> Tensor:
        t, arguments = index if row is None else row, {**self._arguments, "out": out}
        if noise is not None:
            arguments["noise"] = noise
        if model_output is not None and not inputs:
            return self.operators["reverse_step"](x_t, model_output, self._table, t, **arguments)
        return self.operators["step_with_options"](x_t, model_output, self._table, t, **arguments, **inputs)
