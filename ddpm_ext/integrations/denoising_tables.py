"""Rows for the operators, made from the buffers of an object of denoising-diffusion-pytorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_ext.integrations.fallback import Fallback, cached_with
from ddpm_ext.integrations.peer_tables import TABLES, rows_of
from ddpm_ext.integrations.tensors import DTYPES
from ddpm_ext.tables import samplers
from ddpm_ext.tables.grid import Jumps
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.samplers import coefficients
from ddpm_ext.tables.step_table import StepTable

BUFFERS = ("alphas_cumprod", *TABLES, "loss_weight")  # the names of the buffers that determine the rows


class DenoisingTables:
    """The rows of an object of denoising-diffusion-pytorch.

    Args:
        prediction: ddpm_ext's name of the model's prediction.
        buffers: the tensors of the object's BUFFERS, in this order.

    Attributes:
        steps: the result of peer_tables.rows_of.
        device, dtype: the device and dtype of the buffers.
        sample_dtypes: the dtypes of samples that the library's step does not change to another dtype.

    Raises Fallback for numbers that are not finite.
    """

    def __init__(self, prediction: str, buffers: Sequence[Tensor]) -> None:
        self.device = buffers[0].device
        self.dtype = functools.reduce(torch.promote_types, (buffer.dtype for buffer in buffers))
        self.sample_dtypes = {dtype for dtype in DTYPES if torch.promote_types(dtype, self.dtype) == dtype}
        in_float64 = [buffer.detach().to("cpu", torch.float64) for buffer in buffers]
        self._buffers = dict(zip(BUFFERS, in_float64, strict=True))
        self.steps = rows_of(self._buffers, prediction, "buffers")

    def ddim(self, timesteps: int, count: int, eta: float) -> KernelTables:
        """The rows of ddim_sample, the last step first. Raises Fallback if its steps have no fused form.

        Args:
            timesteps: the object's num_timesteps.
            count: the number of steps.
            eta: the object's ddim_sampling_eta.
        """
        return cached_with(self, (timesteps, count, repr(eta)), lambda: self._make_ddim(timesteps, count, eta))

    def _make_ddim(self, timesteps: int, count: int, eta: float) -> KernelTables:
        """The rows of samplers.ddim, except for two differences, which follow the library's code.

        eps is computed from x_0 with the buffer sqrt_recipm1_alphas_cumprod, and the last step returns x_0.
        """
        try:
            eta = samplers.check_eta(eta)
        except (TypeError, ValueError) as error:
            raise Fallback(str(error)) from None
        if not 0 < timesteps <= len(self.steps) or count < 1:
            raise Fallback(f"num_timesteps is {timesteps} and sampling_timesteps {count}")
        # The timesteps, truncated from float32 as in the library. The first number, -1, stands for clean samples, where
        # the last step ends.
        t = torch.linspace(-1, timesteps - 1, steps=count + 1, device="cpu").int().long()[1:]
        a, b = self.steps.get("start", torch.device("cpu"), torch.float64)[t].unbind(1)
        c0, c1, s = torch.ones_like(a), torch.zeros_like(a), torch.zeros_like(a)
        if count > 1:
            names = ("alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
            levels, recip, recipm1 = (self._buffers[name][t] for name in names)
            now, after = levels[1:], levels[:-1]
            grid = Jumps(t[1:], now, after, now / after)
            if (1 - after - coefficients.sigma(grid, eta) ** 2 < 0).any():
                raise Fallback(f"ddim_sampling_eta is {eta}, which adds more noise than the result of a step has")
            table = samplers.ddim(grid, eta=eta, keep_eps=False)
            direction = table.c1 * (1 - now).sqrt()  # the factor of the library's pred_noise
            c0[1:], c1[1:] = after.sqrt() - direction / recipm1[1:], direction * recip[1:] / recipm1[1:]
            s[1:] = table.s
        try:
            return KernelTables(StepTable(t, a, b, c0, c1, s=s))
        except ValueError as error:  # a number is not finite, because a level has no signal
            raise Fallback(str(error)) from None
