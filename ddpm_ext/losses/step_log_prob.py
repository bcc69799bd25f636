"""The log-probability of a sampler's steps, for policy gradients (Black et al. 2024, "DDPO"; Liu et al. 2025).

The step of a row draws from a normal distribution. Without a clip, its mean is linear in x and the model's output m:
mean = A x + B m. So (prev - mean)^2 is B^2 times the squared error of m with the target (prev - A x) / B. The operator
diffusion_loss computes such an error: prev and x take the places of x_start and the noise in its target.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.types import Clip
from ddpm_ext.process.clip import as_fixed_clip
from ddpm_ext.process.process import BACKENDS
from ddpm_ext.tables.on_device import DeviceTables
from ddpm_ext.tables.step_table import StepTable

CACHED = 8  # the largest number of cached DeviceTables, each for a number of elements of a sample
REDUCTIONS = ("mean", "sum")


class StepLogProb:
    """Computes ln p(prev | x, m) of the steps of a table, with m the model's output:

        log_prob = StepLogProb(table, clip_denoised=False)
        log_prob(model(x, t), x, prev, row).mean().backward()

    Args:
        table: rows of a sampler with noise, such as ddpm, ddim with an eta above 0, or flow_sde. Rows of the variance
            "learned_variance" are not recognised, and would be taken for rows with a standard deviation of 1.
        clip_denoised: as in the loop that drew the samples, whether the predicted x_0 is clipped to [-1, 1], or a range
            (low, high). For an element whose x_0 is clipped, the mean is that of the clipped x_0, and there is no
            gradient through x_0.
        reduction: "mean" over a sample's elements, as in Flow-GRPO, or their "sum", the sample's log-probability.
        backend: "fused", or "reference", in plain torch.

    `GaussianDiffusion.step_log_prob` returns a StepLogProb for the options of a loop.

    With backend="fused", one launch computes the weighted squared errors and their gradient, and torch adds a constant.
    With a clip, another launch computes the mean first. The bits of a sample's result depend neither on its batch nor
    on the other samples' rows. So a replay of a rollout has the same bits as the rollout, if the model's output has.
    Store x and prev in float32: in 16 bits, prev would be a rounded draw.

    Other options of a loop are not in the table. With guidance, pass the guided m. A cond_fn, a denoised_fn and
    inpainting are not supported, because they change the steps.

    Raises:
        TypeError, ValueError: an argument has a wrong type, or a name is unknown; a row is no draw from a normal
            distribution around a mean of x and m, because it has history or a learned variance or reads the
            unconditional output; no row has noise.

    Examples:
        >>> from ddpm_ext.losses.step_log_prob import StepLogProb
        >>> from ddpm_ext.tables.grid import make_grid
        >>> from ddpm_ext.tables.samplers import ddim
        >>> table = ddim(make_grid(GaussianDiffusion(1000).alphas_cumprod, [999, 500, 0]), eta=1.0)
        >>> log_prob = StepLogProb(table)(model(x_t, 999), x_t, prev=0.9 * x_t, row=0)  # (batch,)
    """

    def __init__(
        self,
        table: StepTable,
        *,
        clip_denoised: bool | Clip = True,
        reduction: str = "mean",
        backend: str = "fused",
    ) -> None:
        if not isinstance(table, StepTable):
            raise TypeError(
                f"table is a {type(table).__name__}, expected a StepTable; GaussianDiffusion.step_log_prob takes the "
                "options of a loop, such as sampler='ddim', steps=20, eta=1.0"
            )
        if not table.plain:
            raise ValueError("table has rows with l0, l1, cu or history, expected rows that read x and m alone")
        self.table = table.to("cpu")
        self.clip = as_fixed_clip(clip_denoised)
        self.reduction: str = checks.one_of("reduction", reduction, REDUCTIONS)
        self._ops = BACKENDS[checks.one_of("backend", backend, BACKENDS)]
        self._dtype = None if backend == "reference" else torch.float32
        self._output_factor = self.table.c0 * self.table.b + self.table.c2
        self._without_log_prob = ((self.table.s == 0) | (self._output_factor == 0)).tolist()
        if not bool((self.table.s != 0).any()):
            raise ValueError("table has no row with noise, expected a sampler's that draws some, as ddim's with an eta")
        self._tables: BoundedCache[DeviceTables] = BoundedCache(CACHED)

    def __repr__(self) -> str:
        return f"StepLogProb({len(self.table)} rows, clip={self.clip}, reduction={self.reduction!r})"

    def __call__(self, model_output: Tensor, x: Tensor, prev: Tensor, row: int | Tensor) -> Tensor:
        """The log-probability of each sample's step from x to prev.

        Args:
            model_output: m, (batch, ...), like x, or of a lower precision. With guidance, the guided output.
            x: the samples before the step, (batch, ...), float32, float16 or bfloat16. With backend="reference", of any
                float dtype.
            prev: the samples after the step, like x.
            row: the table's row of each sample, int64 (batch,), or one int for all.

        Returns:
            float32 (batch,) (float64 for the reference's float64 samples), differentiable once, in model_output. With
            backend="reference" it is differentiable in model_output, x and prev.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range; a row has
                no noise, or its step does not depend on m; x or prev requires a gradient with backend="fused", unless
                gradients are disabled. Rows on a GPU are not checked: there, a row without noise gives NaN.
        """
        checks.samples("x", x)
        checks.like("prev", prev, "x", x)
        checks.like("model_output", model_output, "x", x, lower=True)
        self._check_rows(row, x)
        if self._dtype is not None and torch.is_grad_enabled():
            for name, tensor in (("x", x), ("prev", prev)):
                if tensor.requires_grad:
                    raise ValueError(
                        f"{name} requires a gradient, expected none: detach it (backend='reference' has one)"
                    )
        elements = math.prod(x.shape[1:]) if self.reduction == "sum" else 1
        tables = self._tables.get_or_make(elements, lambda: self._make(elements))
        dtype = self._dtype or checks.compute_dtype(x.dtype)
        name = "linear"
        if self.clip is not None:
            name, steps = "mean", tables.get("steps", x.device, dtype)
            model_output = self._ops.reverse_step(x, model_output, steps, row, clip=self.clip, add_noise=False)
        rows = tables.get(name, x.device, dtype)
        squares = self._ops.diffusion_loss(model_output, prev, rows, row, noise=x, reduction="none")
        constant = tables.get("constant", x.device, squares.dtype)
        return squares + constant[row.clamp(0, len(constant) - 1) if isinstance(row, Tensor) else row]

    def _check_rows(self, row: int | Tensor, x: Tensor) -> None:
        """Raises TypeError or ValueError for a row that is out of range or has no log-probability that depends on m."""
        rows = len(self.table)
        if isinstance(row, Tensor):
            checks.per_sample("row", row, len(x), x.device, rows - 1)
            indices = sorted(set(row.tolist())) if row.device.type == "cpu" else []
        else:
            indices = [checks.integer("row", row, rows, f"{rows}, of which the table has {rows}")]
        for i in indices:
            if self._without_log_prob[i]:
                raise ValueError(
                    f"row {i} has s {self.table.s[i]} and a weight of m of {self._output_factor[i]}, expected both "
                    "above 0 in size: its step is no random one that m decides"
                )

    def _make(self, elements: int) -> DeviceTables:
        """The tables of the operators that compute the log-probabilities.

        elements: the number of elements of a sample for the reduction "sum", 1 for "mean". The weights contain this
        number, because diffusion_loss is a mean over elements.
        """
        table, output_factor = self.table, self._output_factor
        x_factor = table.c0 * table.a + table.c1
        zeros, ones = torch.zeros_like(table.s), torch.ones_like(table.s)
        weight = -elements / (2 * table.s**2)
        return DeviceTables(
            linear=torch.stack([1 / output_factor, -x_factor / output_factor, weight * output_factor**2, zeros], 1),
            mean=torch.stack([ones, zeros, weight, zeros], 1),
            steps=table.packed("cpu", torch.float64),
            constant=-elements * (table.s.log() + math.log(2 * math.pi) / 2),
        )
