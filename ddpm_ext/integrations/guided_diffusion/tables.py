"""An object's rows for the operators, made of its betas and compared with its own arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.checks import is_plain
from ddpm_ext.integrations.fallback import Fallback, attempt, result_of
from ddpm_ext.losses.rows import LossRows, Terms
from ddpm_ext.process.process import Process
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.on_device import DeviceTables, StepDeviceTables
from ddpm_ext.tables.predictions import peer_predictions
from ddpm_ext.tables.samplers import ddim, ddim_inverse, ddpm
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.variances import peer_variances

__all__ = ["LOSSES", "FusedTables", "Rows", "is_spaced", "tables_of"]

PREDICTIONS = peer_predictions("guided-diffusion")
VARIANCES = peer_variances("guided-diffusion")
# Of each loss_type: whether it includes the squared error, and the factor of the variational term in bits, as a
# function of the number of timesteps.
LOSSES: dict[str, tuple[bool, Callable[[int], float]]] = {
    "MSE": (True, lambda timesteps: 1.0),
    "RESCALED_MSE": (True, lambda timesteps: timesteps / 1000.0),
    "KL": (False, lambda timesteps: 1.0),
    "RESCALED_KL": (False, float),
}
SAME_NAME = (  # arrays that ddpm_ext has by the same name
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
ARRAYS = ("betas", *SAME_NAME, "alphas_cumprod_next", "posterior_log_variance_clipped")
OPTIONS = ("num_timesteps", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps")
SPACED_OPTIONS = ("timestep_map", "original_num_steps")
CACHED = 8  # samplers' rows
LEAST = 1e-30  # of alphas_cumprod: below it, float32 is at the end of its range
IN_TRANSFORM = "its tables are first asked for within a function transform"
Array = npt.NDArray[np.float64]


class Rows(NamedTuple):
    """A sampler's rows; row t is that of timestep t.

    noisy: whether they add noise. learned: whether they take the model's variance. needs_output: whether they need the
    model's output beside the x_0 that follows from it.
    """

    tables: StepDeviceTables
    noisy: bool
    learned: bool = False
    needs_output: bool = False


class Bound(NamedTuple):
    """The variational bound's rows, (timesteps, 8), with zeros at t = 0; and the factor of its terms in bits."""

    tables: DeviceTables
    factor: float


class FusedTables:
    """The tables of one state of a peer's object.

    Args:
        peer: a GaussianDiffusion of guided-diffusion or improved-diffusion.
        model_timesteps: (timesteps,), what a model gets for each timestep.
        draws: (timesteps,), the number of the noise that each step draws.

    Attributes:
        timesteps: how many.
        prediction: the name of what the model predicts.
        learned: whether its output has twice the channels, for a variance.
        spaced: whether the peer is a SpacedDiffusion.
        model_gets_t: whether a model gets the timesteps as they are.

    Raises Fallback where the peer's own code has to run.
    """

    def __init__(self, peer: Any, model_timesteps: Tensor, draws: Tensor) -> None:
        names = (getattr(getattr(peer, name), "name", "") for name in ("model_mean_type", "model_var_type"))
        prediction, variance = (known.get(name) for known, name in zip((PREDICTIONS, VARIANCES), names, strict=True))
        if prediction is None or variance is None:
            raise Fallback
        _check_arrays(peer)
        self.timesteps, self.prediction = int(peer.num_timesteps), prediction
        self.spaced = is_spaced(peer)
        betas = torch.from_numpy(np.array(peer.betas, np.float64))
        self._process = process = Process(self.timesteps, betas, prediction=prediction, variance=variance)
        if not _follow_from_betas(peer, process):
            raise Fallback("its tables are not those that follow from its betas")
        self.learned = process.variance_entry.learned
        self._loss_rows = LossRows(process)
        self._model_timesteps, self._draws = model_timesteps, draws
        ascending = torch.arange(self.timesteps, device="cpu")
        self.model_gets_t = torch.equal(model_timesteps, ascending) and model_timesteps.dtype == torch.int64
        steps = ddpm(process.grid(), prediction=prediction, variance=variance)[::-1]
        self._a, self._b = steps.a, steps.b
        needs_output = prediction == "x_prev"
        if needs_output:  # the model's output is the mean itself, whatever a clip makes of x_0
            zeros = torch.zeros_like(steps.a)
            steps = replace(steps, c0=zeros, c1=zeros, c2=zeros + 1)
        self._ddpm = Rows(self._on_device(steps), True, self.learned, needs_output)
        self._cache: BoundedCache[Rows | Fallback] = BoundedCache(CACHED)
        self._bounds: BoundedCache[Bound] = BoundedCache(len(LOSSES))

    def _on_device(self, steps: StepTable) -> StepDeviceTables:
        for_peer = replace(steps, timestep=self._model_timesteps, draw=self._draws)
        return StepDeviceTables(for_peer, predict=torch.stack([self._a, self._b], 1))

    def rows(self, sampler: str, eta: object = 0.0, x0_changes: bool = True) -> Rows:
        """The rows of "ddpm", "ddim" or "inverse". Raises Fallback for an eta without a fused form.

        x0_changes: whether the predicted x_0 is changed (clipped, say) before the step goes on with it.
        """
        if sampler == "ddpm":
            return self._ddpm
        if isinstance(eta, bool) or not isinstance(eta, int | float):
            raise Fallback("its eta is no Python number")
        # The eps that a model predicts is more exact than the one derived from an x_0 that is nearly x.
        keep_eps = sampler == "inverse" and self.prediction == "eps" and not x0_changes
        key = (sampler, eta, keep_eps)
        rows = self._cache.get(key)
        if rows is None:
            if not _can_make_tables():
                raise Fallback(IN_TRANSFORM)
            rows = self._cache.get_or_make(key, lambda: attempt(self._make_rows, *key))
        return result_of(rows)

    def _make_rows(self, sampler: str, eta: float, keep_eps: bool) -> Rows:
        with torch.inference_mode(False):
            return self._inverse(eta, keep_eps) if sampler == "inverse" else self._ddim(eta)

    def _ddim(self, eta: float) -> Rows:
        if not 0 <= eta < math.inf:
            raise Fallback("its eta is negative or not finite")
        grid = self._process.grid()
        steps = ddim(grid, prediction=self.prediction, eta=eta, keep_eps=False)
        if (1 - grid.after - steps.s**2 < 0).any():
            raise Fallback("its eta asks for more noise than there is")
        return Rows(self._on_device(steps[::-1]), eta > 0)

    def _inverse(self, eta: float, keep_eps: bool) -> Rows:
        if eta != 0:
            raise Fallback
        grid = make_grid(self._process.alphas_cumprod, torch.arange(self.timesteps, device="cpu"), final=0.0)
        steps = ddim_inverse(grid, prediction="eps", keep_eps=keep_eps)
        return Rows(self._on_device(replace(steps, a=self._a, b=self._b)), False)

    def model_timesteps(self, device: torch.device) -> Tensor:
        """(timesteps,), what a model gets for each timestep."""
        return self._ddpm.tables.timesteps(device)

    def steps(self, device: torch.device) -> Tensor:
        """(timesteps, 8): p_sample's rows."""
        return self._ddpm.tables.get("steps", device, torch.float32)

    def q_sample(self, device: torch.device) -> Tensor:
        """(timesteps, 2): the weights of x_start and of the noise in x_t."""
        return self._process.tables.get("q_sample", device, torch.float32)

    def noise(self, device: torch.device) -> Tensor:
        """(timesteps, 2): weights that leave the noise alone."""
        return self._process.tables.get("noise", device, torch.float32)

    def error(self, device: torch.device) -> Tensor:
        """(timesteps, 4): the rows of the model's mean squared error."""
        return self._loss_rows.get("simple", device, torch.float32)

    def bound(self, loss: str) -> Bound:
        """The variational bound's rows for a loss_type. The peer computes t = 0 with its own normal CDF."""
        return self._bounds.get_or_make(loss, lambda: self._make_bound(loss))

    def _make_bound(self, loss: str) -> Bound:
        factor = LOSSES[loss][1](self.timesteps)
        terms = Terms(error=False, bound=factor / math.log(2))
        with torch.inference_mode(False):
            rows = self._loss_rows.get("simple", torch.device("cpu"), torch.float64, terms).clone()
            rows[0, 3:] = 0
            return Bound(DeviceTables(bound=rows), factor)


def _can_make_tables() -> bool:
    """Whether tensors that are made now can be used later on."""
    return torch.compiler.is_compiling() or is_plain(torch.empty(0, device="cpu"))


def _check_arrays(peer: Any) -> None:
    """Raises Fallback where no rows can be made of the peer's arrays."""
    arrays = [np.asarray(getattr(peer, name)) for name in ARRAYS]
    if any(array.shape != (peer.num_timesteps,) for array in arrays):
        raise Fallback("its tables have other lengths than num_timesteps")
    levels = np.asarray(peer.alphas_cumprod)
    finite = all(bool(np.isfinite(array).all()) for array in arrays)
    if not (finite and levels[-1] > LEAST and levels[0] < 1 and (np.diff(levels) < 0).all()):
        raise Fallback("its alphas_cumprod reach 0, or do not fall from step to step")


def _follow_from_betas(peer: Any, process: Process) -> bool:
    """Whether the peer's arrays are those that its betas give."""
    ours: dict[str, Array] = {name: getattr(process, name).numpy() for name in SAME_NAME}
    variance = ours["posterior_variance"]
    ours["alphas_cumprod_next"] = np.append(ours["alphas_cumprod"][1:], 0.0)
    ours["posterior_log_variance_clipped"] = np.log(np.append(variance[1:2], variance[1:]))
    return all(np.allclose(getattr(peer, name), array, rtol=1e-7, atol=0) for name, array in ours.items())


_STATE, _SPACED_STATE = attrgetter(*ARRAYS, *OPTIONS), attrgetter(*ARRAYS, *OPTIONS, *SPACED_OPTIONS)
Entry = tuple[tuple[Any, ...], FusedTables | Fallback]


def is_spaced(peer: Any) -> bool:
    """Whether it is a SpacedDiffusion, over some of the timesteps of another diffusion, which its models get."""
    return hasattr(peer, "timestep_map")


def tables_of(peer: Any) -> FusedTables:
    """The tables of an object's state, of which the latest are cached. Raises Fallback.

    The state is known by the identity of the object's arrays and options, so an array that is written to in place goes
    unnoticed.
    """
    state = (_SPACED_STATE if is_spaced(peer) else _STATE)(peer)
    key = tuple(map(id, state))
    cache: BoundedCache[Entry] | None = peer.__dict__.get("_fused_cache")
    found = None if cache is None else cache.get(key)
    if found is None:
        if not _can_make_tables():
            raise Fallback(IN_TRANSFORM)
        found = _make_entry(peer, state, key)
    tables = found[1]
    return tables if type(tables) is FusedTables else result_of(tables)


@torch.compiler.disable
def _make_entry(peer: Any, state: tuple[Any, ...], key: tuple[int, ...]) -> Entry:
    """Stores the state, too, so that no other objects get its identities."""
    cache: BoundedCache[Entry] = peer.__dict__.setdefault("_fused_cache", BoundedCache(1))
    return cache.get_or_make(key, lambda: (state, attempt(_make_tables, peer)))


def _make_tables(peer: Any) -> FusedTables:
    spaced = is_spaced(peer)
    with torch.inference_mode(False), torch.device("cpu"):
        timesteps = torch.arange(int(peer.num_timesteps), device="cpu")
        # The peer's own code maps a timestep to what a model gets.
        model = (lambda x, t: t) if not spaced else peer._wrap_model(lambda x, t: t)
        model_timesteps = model(None, peer._scale_timesteps(timesteps))
        return FusedTables(
            peer, model_timesteps, torch.tensor(peer.timestep_map, device="cpu") if spaced else timesteps
        )
