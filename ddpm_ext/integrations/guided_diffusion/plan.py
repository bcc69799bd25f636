"""An object's tables: rows for the operators, made of its betas and held against its own arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddpm_ext.base.checks import is_plain
from ddpm_ext.losses.rows import LossRows, Terms
from ddpm_ext.process.process import Process
from ddpm_ext.tables.on_device import DeviceTables, StepDeviceTables
from ddpm_ext.tables.samplers import ddim, ddim_inverse, ddpm
from ddpm_ext.tables.spacing import make_grid
from ddpm_ext.tables.step_table import COLUMNS, StepTable
from ddpm_ext.tables.variances import VARIANCES as VARIANCE_ENTRIES

__all__ = ["Plan", "Rows", "plan_of"]

PREDICTIONS = {"EPSILON": "eps", "START_X": "x0", "PREVIOUS_X": "x_prev"}
VARIANCES = {name.upper(): name for name in ("fixed_small", "fixed_large", "learned", "learned_range")}
# Whether the error counts, and by what the bound's term, in bits, is multiplied: by the number of timesteps, or not.
LOSSES: dict[str, tuple[bool, Callable[[int], float]]] = {
    "MSE": (True, lambda timesteps: 1.0),
    "RESCALED_MSE": (True, lambda timesteps: timesteps / 1000.0),
    "KL": (False, lambda timesteps: 1.0),
    "RESCALED_KL": (False, float),
}
SAME_NAME = (
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
SPACED = ("timestep_map", "original_num_steps")
KEPT = 8  # etas
LEAST = 1e-30  # of alphas_cumprod, below which float32 is at the end of its range
TRANSFORMED = "its tables are first asked for within a function transform"
Array = npt.NDArray[np.float64]


class Rows(NamedTuple):
    """A sampler's rows, row t that of timestep t.

    noisy: whether they add noise; learned: whether they take the model's variance; keeps: whether they need the model's
    output beside the x_0 that follows from it.
    """

    tables: StepDeviceTables
    noisy: bool
    learned: bool = False
    keeps: bool = False


class Bound(NamedTuple):
    """Of the variational bound's terms: rows (timesteps, 8), in which t = 0 counts nothing; and what a bit counts."""

    tables: DeviceTables
    factor: float


class Plan:
    """Of one state of a peer's object.

    Args:
        peer: a GaussianDiffusion of guided-diffusion or improved-diffusion.
        told: (timesteps,), what a model is told of each timestep.
        draws: (timesteps,), the noise that each step draws.

    Attributes:
        why: why the peer's own code has to run: a reason, "" where that will raise an error, None: it has not to.
        timesteps, prediction, learned: how many; the name of what the model predicts; whether its output has twice the
            channels.
    """

    def __init__(self, peer: Any, told: Tensor, draws: Tensor) -> None:
        names = (getattr(getattr(peer, name), "name", "") for name in ("model_mean_type", "model_var_type"))
        prediction, variance = (known.get(name) for known, name in zip((PREDICTIONS, VARIANCES), names, strict=True))
        self.why = "" if prediction is None or variance is None else _refusal(peer)
        if self.why is not None or prediction is None or variance is None:
            return
        self.prediction, self.learned = prediction, VARIANCE_ENTRIES[variance].learned
        self.timesteps = int(peer.num_timesteps)
        betas = torch.from_numpy(np.array(peer.betas, np.float64))
        self.forward = Process(self.timesteps, betas, prediction=prediction, variance=variance)
        self._loss_rows = LossRows(self.forward)
        if not _alike(peer, self.forward):
            self.why = "its tables are not those that follow from its betas"
            return
        self._told, self._draws = told, draws
        self.tells_t = torch.equal(told, torch.arange(self.timesteps, device="cpu")) and told.dtype == torch.int64
        descending = torch.arange(self.timesteps - 1, -1, -1, device="cpu")
        self._grid = make_grid(self.forward.alphas_cumprod, descending, betas=betas)
        steps = ddpm(self._grid, prediction=prediction, variance=variance)[::-1]
        self._a, self._b = steps.a, steps.b
        keeps = prediction == "x_prev"
        if keeps:  # the model's output is the mean itself, whatever a clip makes of x_0
            zeros = torch.zeros_like(steps.a)
            steps = _changed(steps, c0=zeros, c1=zeros, c2=zeros + 1)
        self._ddpm = Rows(self._tables(steps), True, self.learned, keeps)
        self._rows: dict[tuple[str, float, bool], Rows] = {}
        self._bound: dict[str, Bound] = {}

    def _tables(self, steps: StepTable) -> StepDeviceTables:
        told = _changed(steps, timestep=self._told, draw=self._draws)
        return StepDeviceTables(told, predict=torch.stack([self._a, self._b], 1))

    def rows(self, sampler: str, eta: object = 0.0, changed: bool = True) -> Rows | str:
        """Of "ddpm", "ddim" or "inverse"; or why there are none, as `why`.

        changed: whether something is done to the predicted x_0 (it is clipped, say) before the step goes on with it.
        """
        if sampler == "ddpm":
            return self._ddpm
        if isinstance(eta, bool) or not isinstance(eta, int | float):
            return "its eta is no Python number"
        # the eps that a model predicts is better than what is left of it in an x_0 that is nearly x
        keeps = sampler == "inverse" and self.prediction == "eps" and not changed
        rows = self._rows.get((sampler, eta, keeps))
        if rows is not None:
            return rows
        if not _can_make():
            return TRANSFORMED
        with torch.inference_mode(False):
            made = self._inverse(eta, keeps) if sampler == "inverse" else self._ddim(eta)
        if isinstance(made, Rows):
            if len(self._rows) == KEPT:
                self._rows.clear()
            self._rows[sampler, eta, keeps] = made
        return made

    def _ddim(self, eta: float) -> Rows | str:
        if not 0 <= eta < math.inf:
            return "its eta is negative or not finite"
        steps = ddim(self._grid, prediction=self.prediction, eta=eta, keep_eps=False)
        if (1 - steps.after - steps.s**2 < 0).any():
            return "its eta asks for more noise than there is"
        return Rows(self._tables(steps[::-1]), eta > 0)

    def _inverse(self, eta: float, keeps: bool) -> Rows | str:
        if eta != 0:
            return ""
        grid = make_grid(self.forward.alphas_cumprod, torch.arange(self.timesteps, device="cpu"), final=0.0)
        steps = ddim_inverse(grid, prediction="eps", keep_eps=keeps)
        return Rows(self._tables(_changed(steps, a=self._a, b=self._b)), False)

    def told(self, device: torch.device) -> Tensor:
        """(timesteps,), what a model is told of each timestep."""
        return self._ddpm.tables.timesteps(device)

    def steps(self, device: torch.device) -> Tensor:
        """(timesteps, 8): p_sample's rows."""
        return self._ddpm.tables.get("steps", device, torch.float32)

    def q_sample(self, device: torch.device) -> Tensor:
        """(timesteps, 2)"""
        return self.forward.tables.get("q_sample", device, torch.float32)

    def error(self, device: torch.device) -> Tensor:
        """(timesteps, 4): the rows of the model's mean squared error."""
        return self._loss_rows.get("simple", device, torch.float32)

    def bound(self, loss: str) -> Bound:
        """Of a loss_type's name. Bins at t = 0 have a normal distribution of the peer's own, an approximation, so their
        term is the peer's."""
        found = self._bound.get(loss)
        if found is None:
            factor = LOSSES[loss][1](self.timesteps)
            terms = Terms(error=False, bound=factor / math.log(2))
            with torch.inference_mode(False):
                rows = self._loss_rows.get("simple", torch.device("cpu"), torch.float64, terms).clone()
                rows[0, 3:] = 0
                found = self._bound[loss] = Bound(DeviceTables(bound=rows), factor)
        return found


class _Unready(Plan):
    """Where none can be made."""

    def __init__(self) -> None:
        self.why = TRANSFORMED


def _can_make() -> bool:
    """Whether tensors that are made now are of use later on."""
    return torch.compiler.is_compiling() or is_plain(torch.empty(0, device="cpu"))


def _changed(steps: StepTable, **columns: Tensor) -> StepTable:
    return StepTable(**{name: getattr(steps, name) for name in COLUMNS} | columns)


def _refusal(peer: Any) -> str | None:
    """Why there are no rows."""
    arrays = [np.asarray(getattr(peer, name)) for name in ARRAYS]
    if any(array.shape != (peer.num_timesteps,) for array in arrays):
        return "its tables have other lengths than num_timesteps"
    levels = np.asarray(peer.alphas_cumprod)
    finite = all(bool(np.isfinite(array).all()) for array in arrays)
    if not (finite and levels[-1] > LEAST and levels[0] < 1 and (np.diff(levels) < 0).all()):
        return "its alphas_cumprod reach 0, or do not fall from step to step"
    return None


def _alike(peer: Any, forward: Process) -> bool:
    """Whether the peer's arrays are what the rows are made of."""
    ours: dict[str, Array] = {name: getattr(forward, name).numpy() for name in SAME_NAME}
    variance = ours["posterior_variance"]
    ours["alphas_cumprod_next"] = np.append(ours["alphas_cumprod"][1:], 0.0)
    ours["posterior_log_variance_clipped"] = np.log(np.append(variance[1:2], variance[1:]))
    return all(np.allclose(getattr(peer, name), array, rtol=1e-7, atol=0) for name, array in ours.items())


_STATE, _SPACED_STATE = attrgetter(*ARRAYS, *OPTIONS), attrgetter(*ARRAYS, *OPTIONS, *SPACED)


def plan_of(peer: Any, spaced: bool) -> Plan:
    """The plan of an object's state, by the identity of what that consists of: an array that is written to in place
    goes unseen. The latest is kept."""
    state = (_SPACED_STATE if spaced else _STATE)(peer)
    key = tuple(map(id, state))
    plans: dict[tuple[int, ...], tuple[tuple[Any, ...], Plan]] = peer.__dict__.setdefault("_plans", {})
    found = plans.get(key)
    if found is not None:
        return found[1]
    if not _can_make():
        return _Unready()
    plan = _make(peer, spaced)
    plans.clear()
    plans[key] = state, plan  # with what the identities are of
    return plan


@torch.compiler.disable
def _make(peer: Any, spaced: bool) -> Plan:
    with torch.inference_mode(False), torch.device("cpu"):
        timesteps = torch.arange(int(peer.num_timesteps))
        # the peer's own code tells what a model is told
        asked = (lambda x, t: t) if not spaced else peer._wrap_model(lambda x, t: t)
        told = asked(None, peer._scale_timesteps(timesteps))
        return Plan(peer, told, torch.tensor(peer.timestep_map) if spaced else timesteps)
