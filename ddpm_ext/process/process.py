"""A Gaussian diffusion process: a noise schedule, its tables, and the operators that take the tables."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_ext.base import checks
from ddpm_ext.base.cache import BoundedCache
from ddpm_ext.base.types import Clip, Model
from ddpm_ext.ops import fused, reference
from ddpm_ext.ops.noise import Philox
from ddpm_ext.ops.torch_library import is_traced
from ddpm_ext.process.model_output import unwrap
from ddpm_ext.tables.grid import Grid, make_grid
from ddpm_ext.tables.levels import timesteps_by
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.predictions import PREDICTIONS, Levels, Prediction
from ddpm_ext.tables.samplers import ddpm
from ddpm_ext.tables.schedules import NoiseSchedule, forward_levels
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.tables.variances import VARIANCES, Variance

CACHED_STEPS = 8  # the largest number of cached TableSteps, each for a device, a clip and the numbers of a Philox
BACKENDS: dict[str, ModuleType] = {"fused": fused, "reference": reference}  # the modules with the operators

SCHEDULE_ATTRIBUTES = (  # attributes that the class of Zhihu's tutorial on DDPM has, too
    "betas",
    "alphas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


class Process:
    """A schedule with its tables and operators, for steps, loops, losses and likelihoods.

    The arguments are those of GaussianDiffusion, which adds methods for training and sampling.

    Attributes:
        timesteps, prediction, variance, backend: the arguments.
        schedule: a ForwardLevels, with the levels, the model's timestep at each level, and the scale of samples.
        magnitude: float64 (timesteps,), the factor r of x_t = r x, where x is variance-preserving. It is 1 for a
            schedule of betas.
        magnitude_before: float64 (timesteps,), the factor r of x_{t-1}, which is 1 for clean data.
        tables: the tables that the kernels read, by name and device: the rows of steps ("steps"), the rows that return
            the predicted x_0 instead ("x0"), and other tables with a row or a number for each timestep.
        The names in SCHEDULE_ATTRIBUTES: float64 (timesteps,), on the CPU, for the variance-preserving x.

    Raises:
        TypeError, ValueError: an argument has a wrong type, an unknown name, or is out of range.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        beta_schedule: str | Tensor | NoiseSchedule = "linear",
        *,
        prediction: str = "eps",
        variance: str = "fixed_small",
        backend: str = "fused",
    ) -> None:
        self.schedule = schedule = forward_levels(beta_schedule, timesteps)
        self.betas = betas = schedule.betas
        self.timesteps = len(betas)
        self.prediction: str = checks.one_of("prediction", prediction, PREDICTIONS)
        self.variance: str = checks.one_of("variance", variance, VARIANCES)
        self.backend: str = checks.one_of("backend", backend, BACKENDS)
        if schedule.scale is not None and not self.prediction_entry.any_step:
            raise ValueError(f"prediction is {prediction!r} with levels in place of betas, expected another")

        self.alphas = 1 - betas
        self.alphas_cumprod = alphas_cumprod = schedule.alphas_cumprod
        self.alphas_cumprod_prev = alphas_cumprod_prev = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)

        # q(x_t | x_0), eq. (4) of Ho et al. 2020, and its inverse
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt()
        self.log_one_minus_alphas_cumprod = (1 - alphas_cumprod).log()
        self.sqrt_recip_alphas_cumprod = (1 / alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt()

        self.magnitude = torch.ones_like(betas)
        if schedule.scale is not None:
            self.magnitude = torch.hypot(schedule.signal, schedule.noise)
        self.magnitude_before = F.pad(self.magnitude[:-1], (1, 0), value=1.0)

        # q(x_{t-1} | x_t, x_0), eq. (6) and (7) of Ho et al. Its variance at t = 0 is 0, so the logarithm is clipped.
        self.posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.posterior_log_variance_clipped = self.posterior_variance.clamp(min=1e-20).log()
        self.posterior_mean_coef1 = betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod)
        self.posterior_mean_coef2 = (1 - alphas_cumprod_prev) * self.alphas.sqrt() / (1 - alphas_cumprod)

        self.tables = self._make_tables()
        self._reverse_steps: BoundedCache[Any] = BoundedCache(CACHED_STEPS)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(timesteps={self.timesteps}, prediction={self.prediction!r}, "
            f"variance={self.variance!r}, backend={self.backend!r})"
        )

    def _make_tables(self) -> KernelTables:
        descending = ddpm(self.grid(), prediction=self.prediction, variance=self.variance)
        fixed = self.variance_entry.schedule(self.betas, self.posterior_variance)
        signal, noise, r, before = self.schedule.signal, self.schedule.noise, self.magnitude, self.magnitude_before
        x_factor, eps_factor = PREDICTIONS["eps"].x0(self.levels)
        return KernelTables(
            self.for_model(descending)[::-1],  # row t is timestep t
            q_sample=torch.stack([signal, noise], 1),
            noise=torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu").expand(self.timesteps, 2),
            predict_start_from_noise=torch.stack([x_factor / r, eps_factor], 1),
            posterior_mean=torch.stack([self.posterior_mean_coef1 * before, self.posterior_mean_coef2 * before / r], 1),
            q_variance=(1 - self.alphas_cumprod) * r**2,
            q_log_variance=self.log_one_minus_alphas_cumprod + 2 * r.log(),
            posterior_variance=self.posterior_variance * before**2,
            posterior_log_variance_clipped=self.posterior_log_variance_clipped + 2 * before.log(),
            p_variance=fixed.variance * before**2,
            p_log_variance=fixed.log_variance + 2 * before.log(),
            finite_log_variance=fixed.finite.log() + 2 * before.log(),
            learned_log_variance=torch.stack(
                [2 * descending.l0.flip(0) + 2 * before.log(), 2 * descending.l1.flip(0)], 1
            ),
            variance_before=before**2,
        )

    @property
    def ops(self) -> ModuleType:
        """The operators of the backend."""
        return BACKENDS[self.backend]

    @property
    def prediction_entry(self) -> Prediction:
        return PREDICTIONS[self.prediction]

    @property
    def variance_entry(self) -> Variance:
        return VARIANCES[self.variance]

    @property
    def levels(self) -> Levels:
        """The levels of the variance-preserving x = x_t / r at each timestep, float64 (timesteps,)."""
        return Levels(self.alphas_cumprod, self.posterior_mean_coef1, self.posterior_mean_coef2)

    def grid(self) -> Grid:
        """The grid of all timesteps, from the noisiest to the cleanest."""
        all_timesteps = torch.arange(self.timesteps - 1, -1, -1, device="cpu")
        return self.scaled(make_grid(self.alphas_cumprod, all_timesteps, betas=self.betas))

    def scaled(self, grid: Grid) -> Grid:
        """A grid of alphas_cumprod, converted to the scale of the schedule's samples."""
        return replace(grid, scale=self.schedule.scale)

    def for_model(self, rows: StepTable) -> StepTable:
        """Replaces the rows' timesteps in the schedule, maybe fractional, by those that the model is called with."""
        timestep = self.schedule.timestep
        if timestep is None:
            return rows
        t = rows.timestep
        if not t.is_floating_point():
            return replace(rows, timestep=timestep[t])
        if self.schedule.timestep_of is not None:
            # A row that starts at clean data, as in dpmpp_2m_cfg_pp, calls no model. It gets the timestep of the row
            # before it, since timestep_of is not defined without noise.
            start_rows = torch.arange(len(rows), device="cpu") - (rows.noise_now == 0).long()
            levels = rows.signal_now[start_rows], rows.noise_now[start_rows]
            return replace(rows, timestep=timesteps_by(self.schedule.timestep_of, *levels))
        low = t.floor().long()
        high = (low + 1).clamp(max=self.timesteps - 1)
        return replace(rows, timestep=torch.lerp(timestep.double()[low], timestep.double()[high], t - low))

    # ------------------------------------------------------------------------------------------------- tables

    def table(self, name: str, x_name: str, x: Tensor) -> Tensor:
        """The table of this name for an operator with samples x: on x's device, in the dtype that the backend needs.

        Raises TypeError unless x is a tensor; the error calls it `x_name`.
        """
        if not isinstance(x, Tensor):
            checks.tensor(x_name, x)
        dtype = torch.float32 if self.backend == "fused" else checks.compute_dtype(x.dtype)
        return self.tables.get(name, x.device, dtype)

    def reverse_step(self, x_t: Tensor, clip: Clip | None, noise: Tensor | None, rng: Philox | None) -> Any:
        """The backend's TableStep for this process's table "steps", with this clip and noise.

        The fused backend's TableSteps are cached, except with `noise` or with an rng that has tensors, which the cache
        would keep alive. The reference's are not cached: the dtype of their table depends on x_t's, and is not in the
        cache key.
        """
        numbers: tuple[int | None, ...] | None = ()
        if rng is not None:
            numbers = rng.numbers() if type(rng) is Philox else None
        if noise is not None or numbers is None or is_traced():
            return self._make_reverse_step(x_t, clip, noise, rng)
        if not isinstance(x_t, Tensor):
            checks.tensor("x_t", x_t)
        key = (x_t.is_cpu or x_t.device, clip, numbers)
        step = self._reverse_steps.get(key) if self.backend == "fused" else None
        if step is None:
            # The cached step gets a copy of rng, because the caller may change rng's attributes.
            step = self._make_reverse_step(x_t, clip, None, copy(rng))
            if self.backend == "fused" and checks.is_plain(self.table("steps", "x_t", x_t)):
                self._reverse_steps.get_or_make(key, lambda: step)
        return step

    def _make_reverse_step(self, x_t: Tensor, clip: Clip | None, noise: Tensor | None, rng: Philox | None) -> Any:
        table = self.table("steps", "x_t", x_t)
        on_host = self.tables.get("steps", torch.device("cpu"), table.dtype)
        return self.ops.TableStep(table, on_host=on_host, clip=clip, noise=noise, rng=rng)

    def extract(self, name: str, t: int | Tensor, x: Tensor) -> Tensor:
        """The values of a table at t, (batch, 1, ...), float32 (float64 for float64 samples)."""
        return self.at(self.tables.get(name, x.device, checks.compute_dtype(x.dtype)), t, x)

    @staticmethod
    def at(values: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
        """values[t], of shape (batch, 1, ...). A timestep in a tensor t that is out of range counts as the nearest."""
        picked = values[t.clamp(0, len(values) - 1)] if isinstance(t, Tensor) else values[t].expand(len(x))
        return picked.reshape(len(x), *[1] * (x.dim() - 1))

    def call_model(self, model: Model, x: Tensor, t: int | Tensor, kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """The model's output for x at t. For an int t, the model gets a cached tensor, so no launch makes one.

        The model is called with the timestep that the schedule has for the model, which may be another number than t.
        """
        if not isinstance(t, Tensor):
            t = self.tables.timestep(t, x.size(0), x.device)
        elif self.schedule.timestep is not None:
            t = self.tables.timesteps(x.device)[t.clamp(0, self.timesteps - 1)]
        output = model(x, t, **kwargs) if kwargs else model(x, t)
        return output if isinstance(output, Tensor) else unwrap(output)

    # ---------------------------------------------------------------------------------------- forward process

    def q_sample(
        self,
        x_start: Tensor,
        t: int | Tensor,
        noise: Tensor | None = None,
        *,
        rng: Philox | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x_t ~ q(x_t | x_0): sqrt(alphas_cumprod) x_start + sqrt(1 - alphas_cumprod) noise (Ho et al. 2020, eq. 4).

        For a schedule of levels, the levels of signal and noise replace these two factors.

        Args:
            x_start: (batch, ...), usually in [-1, 1].
            t: int64 (batch,) or int, in [0, timesteps).
            noise: like x_start. With None, it is drawn by `rng` (stream 2, draw t), or by a seed from torch's default
                generator.
            out: a tensor like x_start for the result, or x_start itself. With the fused backend, no input may then
                require a gradient.

        Returns:
            x_t, like x_start. Differentiable in x_start and noise.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or is out of range.
        """
        table = self.table("q_sample", "x_start", x_start)
        return self.ops.forward_process(x_start, table, t, noise=noise, rng=rng, out=out)

    def q_mean_variance(self, x_start: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) (Ho et al. 2020, eq. 4).

        Returns:
            mean like x_start; variance and log-variance of shape (batch, 1, ...).
        """
        mean = self.ops.forward_process(x_start, self.table("q_sample", "x_start", x_start), t, add_noise=False)
        return mean, self.extract("q_variance", t, x_start), self.extract("q_log_variance", t, x_start)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 6, 7).

        Returns:
            mean like x_start; variance and log-variance of shape (batch, 1, ...). The latter is at least ln 1e-20.
        """
        mean = self.ops.posterior_mean(x_start, x_t, self.table("posterior_mean", "x_start", x_start), t)
        return (
            mean,
            self.extract("posterior_variance", t, x_start),
            self.extract("posterior_log_variance_clipped", t, x_start),
        )

    def predict_start_from_noise(self, x_t: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """The x_0 from which q_sample makes x_t with this noise: the inverse of q_sample.

        If alphas_cumprod is 0, x_t does not depend on x_0. The result is then 2^100 (x_t - noise), of which only the
        sign has a meaning.
        """
        return self.ops.predict_start(x_t, noise, self.table("predict_start_from_noise", "x_t", x_t), t)
