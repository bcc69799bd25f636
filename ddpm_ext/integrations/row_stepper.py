"""RowStepper, which takes the rows of a step table for schedulers, samplers and traced loops.

A row takes one launch, or two with dynamic thresholding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.base import checks
from ddpm_ext.base.types import Clip
from ddpm_ext.ops import reference
from ddpm_ext.ops.cards import check_card, in_use
from ddpm_ext.ops.noise import Philox
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.ops.row import ROW
from ddpm_ext.ops.table_step import CalledTableStep
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.row_needs import row_needs
from ddpm_ext.tables.step_table import StepTable

HISTORY = ("history1", "history2", "history3")
# A row's factors of the tensors that it reads besides the sample and the model's output: "cu" of uncond_output, which
# in traced loops is the previous row's result, and the others of HISTORY.
OTHER_FACTORS = ("cu", "h1", "h2", "h3")
LARGEST_NORMAL = 8.0  # no normal number is expected to be larger
CPU = torch.device("cpu")
# For a row: (index in the history, name of the operator's argument) of each tensor that it reads, and whether it keeps
# one.
Reads = tuple[list[tuple[int, str]], bool]


class RowStepper:
    """Takes the rows of a step table in any order. The caller stores the tensors that rows keep for later rows.

    Args:
        table: the table, or a function that returns it, called when the table is first needed.
        clip: the range to which predicted clean samples are clipped.
        threshold: dynamic thresholding of predicted clean samples, before the clip.
        packed: the packed rows of the table, if they exist already.

    Attributes:
        clip, threshold: the arguments.
        needs: the inputs that each row needs.
    """

    _c_in: Tensor | None = None

    def __init__(
        self,
        table: StepTable | Callable[[], StepTable],
        clip: Clip | None = None,
        threshold: DynamicThreshold | None = None,
        *,
        packed: Tensor | None = None,
    ) -> None:
        self._table_or_function, self.clip, self.threshold = table, clip, threshold
        self.needs = row_needs(self.table)
        if packed is None:
            with torch.inference_mode(False):
                packed = self.table.packed("cpu")
        self._packed = {(CPU, torch.float32): packed}
        self._quiet_steps: dict[tuple[torch.device, torch.dtype], CalledTableStep] = {}  # steps without an rng
        self._bound = {} if threshold is None else {"quantile": threshold.quantile, "maximum": threshold.maximum}
        kinds = {row.history for row in self.needs}
        reads = {kind: [(k, name) for k, name in enumerate(HISTORY) if kind[k]] for kind in kinds}
        self._reads: list[Reads] = [(reads[row.history], row.keeps) for row in self.needs]

    @functools.cached_property
    def table(self) -> StepTable:
        table = self._table_or_function
        return table if isinstance(table, StepTable) else table()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out tensors on devices that may not exist where the object is unpickled."""
        packed = {key: rows for key, rows in self._packed.items() if key[0].type == "cpu"}
        return {**self.__dict__, "_packed": packed, "_quiet_steps": {}}

    def for_inputs(self, c_in: Tensor) -> RowStepper:
        """The same rows, which can also write the model's next input to `model_input`: c_in[i] times row i's result.

        Args:
            c_in: (rows,).
        """
        stepper, key = copy.copy(self), (CPU, torch.float32)
        with torch.inference_mode(False):
            packed = self._packed[key].clone()
            packed[:, ROW.index("c_in")] = c_in
        stepper.__dict__.update(_c_in=c_in, _packed={key: packed}, _quiet_steps={})
        return stepper

    def take(
        self, i: int, x: Tensor, m: Tensor, history: Sequence[Tensor], inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Takes row i in one launch, or two with a threshold. Returns the next sample and the tensor that is kept.

        The operators of the C++ module compute float32, float16 and bfloat16 on CPU and CUDA devices, the reference in
        PyTorch everything else.

        Args:
            history: the tensors that earlier rows kept, the newest first.
            inputs: further arguments of TableStep.take, such as noise and x0_out. Also `rng`, which draws the row's
                noise. Without `rng` and `noise`, no noise is added. Also `out`, to which the next sample is written.
                The dict is changed.
        """
        reads, keeps = self._reads[i]
        stored, dtype = None, x.dtype
        for k, name in reads:
            read = history[k]
            inputs[name] = read if read.dtype is dtype else read.to(dtype)
        if keeps:  # a copy, even of the model's output: a CUDA graph writes all outputs to one tensor
            stored = inputs["history_out"] = empty_like(x)
        if self._bound:
            inputs.update(self._bound)
        rng, out = inputs.pop("rng", None), inputs.pop("out", None)
        return self._step_for(x.device, dtype, rng).take(x, m, None, i, out, **inputs), stored

    def largest_term(self, i: int, x: Tensor, m: Tensor, read_tensors: Sequence[Tensor]) -> float:
        """The size of the largest term that row i adds up, on which the rounding error of its result depends.

        Args:
            read_tensors: the tensors that the row reads besides sample and output.
        """
        row = {
            name: abs(float(getattr(self.table, name)[i])) for name in ("a", "b", "c0", "c1", "c2", "s", *OTHER_FACTORS)
        }
        sample, output, *other_sizes = (
            float(tensor.abs().max()) if tensor.numel() else 0.0 for tensor in (x, m, *read_tensors)
        )
        clean = row["a"] * sample + row["b"] * output
        other_terms = max(row[name] for name in OTHER_FACTORS) * max(other_sizes, default=0.0)
        terms = row["c0"] * clean, row["c1"] * sample, row["c2"] * output, row["s"] * LARGEST_NORMAL, other_terms
        return max(clean, *terms)

    def _step_for(self, device: torch.device, dtype: torch.dtype, rng: Philox | None) -> CalledTableStep:
        """The TableStep for samples of this dtype and device. Without `rng`, only noise that `take` gets is added."""
        key = (device, dtype)
        step = self._quiet_steps.get(key) if rng is None else None
        if step is None:
            operators = ops if dtype is not torch.float64 and device.type in ("cpu", "cuda") else reference
            computed = checks.compute_dtype(dtype)
            on_host = self._rows(CPU, computed) if device.type == "cuda" else None
            rows = self._rows(device, computed)
            step = operators.TableStep(rows, on_host=on_host, clip=self.clip, rng=rng, add_noise=rng is not None)
            if rng is None:
                self._quiet_steps[key] = step
        if device.type != "cpu":
            in_use(self, self._packed, device)
        return step

    def _rows(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The packed rows for the kernels, created once for each device and dtype."""
        rows = self._packed.get((device, dtype))
        if rows is None:
            check_card(device)
            with torch.inference_mode(False):  # Inference tensors could not be saved for a backward pass later on.
                rows = self.table.packed("cpu", dtype)
                if self._c_in is not None:
                    rows[:, ROW.index("c_in")] = self._c_in
                rows = rows.to(device)
            # A tensor that was created within a function transform or a fake mode can't be used after it.
            if checks.is_plain(rows):
                self._packed[device, dtype] = rows
        return rows


def clip_in_notes(table: StepTable, clip: Clip | None, threshold: DynamicThreshold | None = None) -> Clip | None:
    """The clip in the table's notes; `clip` if they have none.

    A note that is a text stands for dynamic thresholding. Then the result is `clip`, and a ValueError is raised if the
    text is not that of `threshold`.
    """
    clip_note = table.notes.get("clip", clip)
    if isinstance(clip_note, str) and clip_note != str(threshold):
        raise ValueError(f"the table was made for the clip {clip_note}, expected a loop with it, not with {threshold}")
    return clip if isinstance(clip_note, str) else checks.clip_range(clip_note)


def take_step(
    tables: KernelTables,
    x: Tensor,
    m: Tensor | None,
    t: int | Tensor,
    clip: Clip | None = (-1.0, 1.0),
    *,
    rng: Philox | None = None,
    out: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """A single step by rows of `tables`: by row t for all samples, or by row t[i] for sample i.

    The noise is drawn by `rng`, or is the input `noise`; without both, no noise is added. The other arguments are those
    of TableStep.take.
    """
    table = tables.get("steps", x.device, torch.float32)
    step = ops.TableStep(table, clip=clip, rng=rng, add_noise=rng is not None)
    return step.take(x, m, *checks.split_t(t), out, **inputs)
