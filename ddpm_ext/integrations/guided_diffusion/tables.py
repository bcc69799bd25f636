"""Rows for the operators, made from the betas of an object of guided-diffusion or improved-diffusion.

The object's other arrays must be those that follow from its betas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.integrations.fallback import Fallback, cached_with
from ddpm_ext.losses.rows import LossRows
from ddpm_ext.process.process import SCHEDULE_ATTRIBUTES, Process
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.predictions import peer_predictions
from ddpm_ext.tables.samplers import coefficients, ddim, ddim_inverse, ddpm
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.variances import peer_variances

PREDICTIONS = peer_predictions("guided-diffusion")
VARIANCES = peer_variances("guided-diffusion")
# {loss_type: (whether the loss includes the squared error, a function of the number of timesteps that returns the
# factor of the variational term in bits)}.
LOSSES: dict[str, tuple[bool, Callable[[int], float]]] = {
    "MSE": (True, lambda timesteps: 1.0),
    "RESCALED_MSE": (True, lambda timesteps: timesteps / 1000.0),
    "KL": (False, lambda timesteps: 1.0),
    "RESCALED_KL": (False, float),
}
# Attributes of ddpm_ext's Process that are not compared with the library's: its objects lack the first, no fused method
# reads the second, and the third has another value at t = 0.
NOT_COMPARED = ("alphas", "log_one_minus_alphas_cumprod", "posterior_log_variance_clipped")
SAME_NAME = tuple(name for name in SCHEDULE_ATTRIBUTES if name not in NOT_COMPARED)  # arrays named as in ddpm_ext
ARRAYS = (*SAME_NAME, "alphas_cumprod_next", "posterior_log_variance_clipped")
OPTIONS = ("num_timesteps", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps")
SPACED_OPTIONS = ("timestep_map", "original_num_steps")
LEAST_LEVEL = 1e-30  # the smallest alphas_cumprod with fused steps; smaller ones are near the end of float32's range


class FusedTables:
    """The tables for the steps and losses of an object, made from its current arrays and options.

    Attributes:
        prediction: ddpm_ext's name of the model's prediction.
        learned: whether the model's output has twice the channels, for a learned variance.
        model_gets_t: whether the model gets the timesteps t unchanged.
        with_error: whether the loss includes the squared error.
        bound_factor: the factor of the variational terms in bits, or None for an unknown loss.

    Raises Fallback if the library's code has to run.
    """

    def __init__(self, peer: Any) -> None:
        peer._check_methods()  # noqa: SLF001 (of PeerDiffusion)
        types = (peer.model_mean_type, peer.model_var_type, peer.loss_type)
        mean, var, loss_type = (getattr(member, "name", "") for member in types)
        prediction, variance, loss = PREDICTIONS.get(mean), VARIANCES.get(var), LOSSES.get(loss_type)
        if prediction is None or variance is None:
            raise Fallback
        self.prediction = prediction
        self._process = process = _process_of(peer, prediction=prediction, variance=variance)
        self.learned = process.variance_entry.learned
        timesteps, spaced = torch.arange(process.timesteps, device="cpu"), _is_spaced(peer)
        with torch.device("cpu"):
            # The library's code maps the timesteps to those that a model gets.
            model = peer._wrap_model(lambda x, t: t) if spaced else lambda x, t: t
            self._model_timesteps = model(None, peer._scale_timesteps(timesteps))
        self._draws = torch.tensor(peer.timestep_map, device="cpu") if spaced else timesteps
        self.model_gets_t = self._model_timesteps.dtype == torch.int64 and torch.equal(self._model_timesteps, timesteps)

        steps = ddpm(process.grid(), prediction=prediction, variance=variance)[::-1]
        self._a, self._b = steps.a, steps.b
        if prediction == "x_prev":  # the model's output is the mean itself, and a clip of x_0 does not change the mean
            zeros = torch.zeros_like(steps.a)
            steps = replace(steps, c0=zeros, c1=zeros, c2=zeros + 1)
        self.with_error = loss is not None and loss[0]
        self.bound_factor = None if loss is None else loss[1](process.timesteps)
        loss_rows = partial(LossRows(process).get, "simple", timesteps.device, torch.float64)
        bound = loss_rows(error=False, bound=(self.bound_factor or 0.0) / math.log(2)).clone()
        # Columns 3 and up are for the bound. At t = 0 they are zeros: there the library's code computes the bound's
        # term, with its own approximation of the normal CDF.
        bound[0, 3:] = 0
        q_sample = torch.stack([process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod], 1)
        self._ddpm = self._on_device(steps, q_sample=q_sample, error=loss_rows(), bound=bound)

    def _on_device(self, steps: StepTable, **tables: Tensor) -> KernelTables:
        for_peer = replace(steps, timestep=self._model_timesteps, draw=self._draws)
        return KernelTables(for_peer, predict=torch.stack([self._a, self._b], 1), **tables)

    def get(self, name: str, device: torch.device) -> Tensor:
        """A table with a row for each timestep.

        - "steps": the steps of p_sample.
        - "q_sample": the weights of x_start and of the noise in x_t.
        - "error": the loss rows of the model's mean squared error.
        - "bound": the loss rows of the variational bound, with zeros at t = 0.
        """
        return self._ddpm.get(name, device, torch.float32)

    def model_timesteps(self, device: torch.device) -> Tensor:
        """The timestep that a model gets for each timestep t, (timesteps,)."""
        return self._ddpm.timesteps(device)

    def rows(self, method: str, eta: object, x0_changes: bool) -> KernelTables:
        """The rows of a library's method, one for each timestep. Raises Fallback for an eta without a fused form.

        Args:
            x0_changes: whether the predicted x_0 is changed, such as clipped, before the step uses it.
        """
        if method == "p_sample":
            return self._ddpm
        if isinstance(eta, bool) or not isinstance(eta, int | float):
            raise Fallback("its eta is no Python number")
        # If x_0 is not changed, ddim_reverse_sample uses the eps that the model predicts. It is more exact than an eps
        # that is computed from x and x_0, whose difference loses digits where x_0 is near x.
        inverse = method == "ddim_reverse_sample"
        keep_eps = inverse and self.prediction == "eps" and not x0_changes
        make = self._inverse if inverse else self._ddim
        return cached_with(self, (method, eta, keep_eps), lambda: make(eta, keep_eps))

    def _ddim(self, eta: float, keep_eps: bool) -> KernelTables:
        if not 0 <= eta < math.inf:
            raise Fallback("its eta is negative or not finite")
        grid = self._process.grid()
        if (1 - grid.after - coefficients.sigma(grid, eta) ** 2 < 0).any():
            raise Fallback("its eta asks for more noise than there is")
        return self._on_device(ddim(grid, prediction=self.prediction, eta=eta, keep_eps=keep_eps)[::-1])

    def _inverse(self, eta: float, keep_eps: bool) -> KernelTables:
        if eta != 0:
            raise Fallback
        ascending = torch.arange(self._process.timesteps, device="cpu")
        grid = make_grid(self._process.alphas_cumprod, ascending, final=0.0)
        steps = ddim_inverse(grid, prediction="eps", keep_eps=keep_eps)
        return self._on_device(replace(steps, a=self._a, b=self._b))


def _process_of(peer: Any, **kinds: str) -> Process:
    """The process with the object's betas. Raises Fallback if its other arrays do not follow from the betas."""
    arrays = {name: np.asarray(getattr(peer, name)) for name in ARRAYS}
    if any(array.shape != (peer.num_timesteps,) for array in arrays.values()):
        raise Fallback("its tables have other lengths than num_timesteps")
    levels = arrays["alphas_cumprod"]
    finite = all(bool(np.isfinite(array).all()) for array in arrays.values())
    if not (finite and levels[-1] > LEAST_LEVEL and levels[0] < 1 and (np.diff(levels) < 0).all()):
        raise Fallback("its alphas_cumprod reach 0, or do not fall from step to step")
    process = Process(len(levels), torch.from_numpy(arrays["betas"].astype(np.float64)), **kinds)
    expected_arrays = {name: getattr(process, name).numpy() for name in SAME_NAME}
    variance = expected_arrays["posterior_variance"]
    expected_arrays["alphas_cumprod_next"] = np.append(expected_arrays["alphas_cumprod"][1:], 0.0)
    expected_arrays["posterior_log_variance_clipped"] = np.log(np.append(variance[1:2], variance[1:]))
    if not all(np.allclose(arrays[name], array, rtol=1e-7, atol=0) for name, array in expected_arrays.items()):
        raise Fallback("its tables are not those that follow from its betas")
    return process


_STATE, _SPACED_STATE = attrgetter(*ARRAYS, *OPTIONS), attrgetter(*ARRAYS, *OPTIONS, *SPACED_OPTIONS)


def _is_spaced(peer: Any) -> bool:
    """Whether the object is a SpacedDiffusion, which takes some of the timesteps of an original diffusion."""
    return hasattr(peer, "timestep_map")


def tables_of(peer: Any) -> FusedTables:
    """The tables of an object's current state, cached. Raises the Fallback of FusedTables.

    The cache key consists of the object's arrays, options and methods; see setting_key.
    """
    state = (_SPACED_STATE if _is_spaced(peer) else _STATE)(peer)
    return peer._cached_by_state(state, lambda: FusedTables(peer))  # noqa: SLF001 (of PeerDiffusion)


def timesteps_for(
    peer: Any, tables: FusedTables, function: Callable[..., Any], t: Tensor, model_t: Tensor | None = None
) -> Tensor:
    """The timesteps that `function`, a model or a cond_fn, gets for t.

    They are t itself if the function maps timesteps to those of the original diffusion, or if there is nothing to map.

    Args:
        model_t: the mapped timesteps, if the caller has computed them.
    """
    if tables.model_gets_t or (_is_spaced(peer) and peer._wrap_model(function) is function):
        return t
    return tables.model_timesteps(t.device)[t] if model_t is None else model_t
