"""diffusers' DDPMScheduler, DDIMScheduler, their parallel twins, and DDIMInverseScheduler.

They have mixins of their own because their steps need no loop: any timestep may come after any other, and a setting
may change in between. All timesteps' rows are there at once, where tracing would follow a loop anew from each step that
is out of turn, and leave a whole loop to diffusers where one step has no row. And no row of numbers has the variances
that a model of DDPM's learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ddpm_ext.base.types import Clip
from ddpm_ext.integrations.diffusers.forward import Forward
from ddpm_ext.integrations.diffusers.scheduler import (
    UNFUSED,
    Again,
    FusedRows,
    are_tensors,
    clip_of,
    imported,
    make_rows,
    own_methods,
    result_dtype,
)
from ddpm_ext.integrations.diffusers.traced_loop import Settings
from ddpm_ext.integrations.diffusers.traced_rows import EDITED
from ddpm_ext.integrations.fallback import Fallback, is_of_arguments
from ddpm_ext.integrations.row_stepper import RowStepper
from ddpm_ext.integrations.shared import Support
from ddpm_ext.integrations.tensors import dtype_name
from ddpm_ext.ops.extension import C
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.grid import Jumps
from ddpm_ext.tables.predictions import peer_predictions
from ddpm_ext.tables.samplers import ddim, ddpm
from ddpm_ext.tables.variances import peer_variances

PREDICTIONS = peer_predictions("diffusers")
# "learned_log" is what ddpm_ext writes for its "learned", and no type of diffusers, which rejects it.
VARIANCES = {name: own for name, own in peer_variances("diffusers").items() if name != "learned_log"}
LEARNED = ("learned", "learned_range")
ONE_LAUNCH = "float32, float16, bfloat16; a timestep a sample, or one for all; gradients"
# What steps read beside the config and relies_on.
WATCHED = (
    *EDITED, "num_inference_steps", "final_alpha_cumprod", "initial_alpha_cumprod", "variance_type", "custom_timesteps",
)  # fmt: skip
NOISY = 1  # the least timestep from which a step of DDPM draws noise
SUPPORT = (
    Support(
        "DDPMScheduler, DDPMParallelScheduler",
        "step",
        "every prediction_type; variance_type fixed_small, fixed_small_log, fixed_large, learned, learned_range; "
        "clip_sample, thresholding; any timesteps",
        "variance_type fixed_large_log; steps to more noise, where diffusers returns NaN; epsilon without a clip where "
        "alphas_cumprod is 0; sample_max_value below 1; float64; gradients",
    ),
    Support(
        "DDPMScheduler, DDPMParallelScheduler",
        "add_noise, get_velocity",
        ONE_LAUNCH,
        "float64; samples that are broadcast",
    ),
    Support(
        "DDIMScheduler, DDIMParallelScheduler",
        "step",
        "every prediction_type; eta up to 1; use_clipped_model_output; variance_noise; clip_sample, thresholding; "
        "set_alpha_to_one; any timestep",
        "eta above 1; steps to more noise, where diffusers returns NaN; epsilon without a clip where alphas_cumprod "
        "is 0; sample_max_value below 1; variance_noise of a wider dtype than the samples; float64; gradients",
    ),
    Support(
        "DDIMScheduler, DDIMParallelScheduler",
        "add_noise, get_velocity",
        ONE_LAUNCH,
        "float64; samples that are broadcast",
    ),
    Support(
        "DDIMInverseScheduler",
        "step",
        "every prediction_type; clip_sample; set_alpha_to_one",
        "sample where the loop starts from clean data; float64; gradients",
    ),
)


def _make(
    alphas_cumprod: Tensor,
    prediction_type: str,
    clip: Clip | None,
    threshold: DynamicThreshold | None,
    to: Tensor | int,
    end: Tensor | float,
    eta: float,
    keep_eps: bool = False,
    variance_type: str | None = None,
) -> FusedRows:
    """The rows of all steps.

    Args:
        to: a stride, for steps from each timestep t to t - stride; with a negative one, that of t comes from t + stride
            instead. Or the timesteps of a loop, each of whose steps leads to the next one.
        end: alphas_cumprod before timestep 0.
        eta, keep_eps: DDIM's.
        variance_type: of DDPM's steps, which have noise as with an eta of 1; None: DDIM's steps.
    """
    if variance_type == "fixed_large_log":  # diffusers takes the square root of a logarithm
        raise Fallback("variance_type is 'fixed_large_log'")
    if prediction_type not in PREDICTIONS or variance_type not in (None, *VARIANCES):
        raise Fallback
    if not 0 <= eta <= 1:
        raise Fallback(f"eta is {eta}")
    levels = alphas_cumprod.detach().cpu()
    if isinstance(to, Tensor):
        t = to.detach().cpu()
        if len(t.unique()) < len(t):
            raise Fallback("its timesteps repeat")
        other = torch.cat([t[1:], t.new_tensor([-1])])
        in_range = (t >= 0) & (t < len(levels)) & (other < len(levels))
        t, other = t[in_range], other[in_range]
    else:
        t = torch.arange(len(levels), device="cpu")
        other = t - abs(to)
    below = torch.as_tensor(end, device="cpu").detach().to(levels.dtype)
    below = torch.where(other >= 0, levels[other.clamp(min=0)], below)
    rises = isinstance(to, int) and to < 0
    now, after = (below, levels[t]) if rises else (levels[t], below)
    fused = (now < 1) & ((after > 0) | (eta == 0))  # else eps does not follow from a sample and its x0
    if prediction_type != "sample" and keep_eps and not eta:
        fused |= after < 1
    fused &= ~(now.signbit() | after.signbit())  # betas above 1 make negative levels, where diffusers returns NaN
    if not rises:
        fused &= now <= after  # else the variance is negative and its root NaN, whatever eta is
    if prediction_type == "epsilon" and clip is None:
        fused &= now > 0
    steps = None
    if fused.any():
        prediction, now, after = PREDICTIONS[prediction_type], now[fused], after[fused]
        # Their quotient is taken in float32, as diffusers takes it: its beta differs by up to 1e-4 from float64's.
        grid = Jumps(t[fused], now.double(), after.double(), (now / after).double())
        if variance_type is None:
            steps = ddim(grid, prediction=prediction, eta=eta, keep_eps=keep_eps)
        else:
            steps = ddpm(grid, prediction=prediction, variance=VARIANCES[variance_type])
    return make_rows(steps, clip, threshold, t[~fused].tolist())


class AnyTimestep(NamedTuple):
    """Steps that are alike but for their timesteps.

    Attributes:
        steps: of each of the scheduler's timesteps, the timestep and its row, or UNFUSED.
        stepper: takes the rows.
        noisy_from: the least timestep whose step draws noise.
    """

    steps: list[tuple[int, int]]
    stepper: RowStepper
    noisy_from: float


class Alphas(Forward):
    """Mixin placed before a scheduler's class in the bases."""

    replaces: ClassVar[tuple[str, ...]] = ("step", "add_noise", "get_velocity")
    alphas_cumprod: Tensor
    num_inference_steps: int | None
    # The peer's step, whose arguments are looked at. It returns its rows and the least timestep that draws noise, or
    # None where it has other tensors than output and sample; and the step's result.
    _looked_at: Callable[..., tuple[tuple[FusedRows, float] | None, Any]]
    _output: ClassVar[tuple[str, str]]  # the module and the class of a step's result

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            found, result = self._looked_at(*args, **kwargs)
        except TypeError as error:
            if is_of_arguments(error):
                raise Fallback from None
            raise
        if found is not None and len(args) == 3 and args[0].dtype is args[2].dtype:
            self._note(*found, args, kwargs)
        return result

    def _note(self, rows: FusedRows, noisy_from: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Knows the steps that are like this one, if it was an element of the scheduler's timesteps. Who writes to
        inference tensors on a CPU is seen by their contents alone."""
        own = self.timesteps
        uncounted = self.alphas_cumprod.is_inference() or (own.is_inference() and own.is_cpu)
        if not isinstance(args[1], Tensor) or self._index_of(args[1]) is None or uncounted:
            return
        assert rows.rows is not None
        steps = [(t, rows.row.get(t, UNFUSED)) for t in self._times()]
        settings = Settings.of(self, (*WATCHED, *self.relies_on))
        self._note_step(args, kwargs, 0, settings, AnyTimestep(steps, rows.rows, noisy_from))

    def _take_again(self, again: Again, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (t, row), (m, _, x) = again.of.steps[place], args
        if row == UNFUSED:
            return None
        noise = self._noise(t >= again.of.noisy_from, m, kwargs.get("generator"), x, -t)
        x0 = noise["x0_out"] = C.empty_result_like(x)
        prev, _ = again.of.stepper.take(row, x, m, (), noise)
        return self._returned((prev, x0), kwargs.get("return_dict", True))

    def _returned(self, done: tuple[Tensor, Tensor], return_dict: bool) -> Any:
        return imported(*self._output)(*done) if return_dict else done

    def _place(self, timestep: Any, sample: Any, model_output: Any, *of: Any) -> tuple[FusedRows, int, int]:
        """The rows, the timestep on the host, and its row. of: _make's arguments from `to` on."""
        if not are_tensors(sample, model_output):
            raise Fallback
        names = self.relies_on
        if own_methods(self._peer, ("step", *names)) is None or not vars(self).keys().isdisjoint(names):
            raise Fallback("somebody has replaced one of its methods")
        config = self.config
        rows = self._rows(_make, self.alphas_cumprod, config.prediction_type, *clip_of(config), *of)
        return rows, *self._row(rows, timestep)

    def _stride(self) -> int:
        if self.num_inference_steps is None:
            raise Fallback
        return int(self.config.num_train_timesteps // self.num_inference_steps)

    def _take_place(
        self,
        place: tuple[FusedRows, int, int],
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any,
        return_dict: bool,
        *,
        noisy: bool,
        given: Tensor | None = None,
        **extras: Any,
    ) -> Any:
        """The step's result. given: its noise, in place of what is drawn."""
        rows, t, row = place
        self._check_step(sample, model_output, given, timestep=timestep)
        if sample.dtype is not model_output.dtype:
            sample = sample.to(result_dtype(model_output, sample))
        if given is None:
            noise = self._noise(noisy, model_output, generator, sample, -t)
        else:
            real = given.is_floating_point()
            if not real or torch.promote_types(given.dtype, sample.dtype) != sample.dtype:
                raise Fallback(f"variance_noise is {dtype_name(given.dtype)}")
            noise = {"noise": given.to(sample.dtype)}
        done = self._take(rows, row, sample, model_output, noise, **extras)
        return self._returned(done, return_dict)


class DDPM(Alphas):
    """For DDPMScheduler."""

    relies_on = ("_get_variance", "_threshold_sample", "previous_timestep")
    variance_type: str
    custom_timesteps: bool
    _output = ("schedulers.scheduling_ddpm", "DDPMSchedulerOutput")

    def _looked_at(
        self, model_output: Tensor, timestep: int, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> tuple[tuple[FusedRows, float] | None, Any]:
        kind = self.variance_type
        if kind != self.config.variance_type:
            raise Fallback("variance_type is not its config's")
        to = self.timesteps if self.custom_timesteps or self.num_inference_steps else 1
        place = self._place(timestep, sample, model_output, to, 1.0, 1.0, False, kind)
        extras: dict[str, Any] = {}
        if kind in LEARNED:
            channels = sample.shape[1]
            if model_output.shape[1] != 2 * channels:
                raise Fallback
            extras = {"model_variance": model_output[:, channels:], "log_variance": kind == "learned_range"}
            model_output = model_output[:, :channels]
        noisy = place[1] >= NOISY
        taken = self._take_place(place, model_output, timestep, sample, generator, return_dict, noisy=noisy, **extras)
        return None if extras else (place[0], NOISY), taken


class DDPMParallel(DDPM):
    """For DDPMParallelScheduler, whose step is DDPMScheduler's."""

    _output = ("schedulers.scheduling_ddpm_parallel", "DDPMParallelSchedulerOutput")


class DDIM(Alphas):
    """For DDIMScheduler."""

    relies_on = ("_get_variance", "_threshold_sample")
    final_alpha_cumprod: Tensor
    _output = ("schedulers.scheduling_ddim", "DDIMSchedulerOutput")

    def _looked_at(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[tuple[FusedRows, float] | None, Any]:
        noisy = eta > 0
        if noisy and variance_noise is not None and generator is not None:
            raise Fallback
        of = self._stride(), self.final_alpha_cumprod, float(eta), not use_clipped_model_output
        place = self._place(timestep, sample, model_output, *of)
        given = variance_noise if noisy else None
        taken = self._take_place(
            place, model_output, timestep, sample, generator, return_dict, noisy=noisy, given=given
        )
        return (place[0], 0 if noisy else math.inf), taken


class DDIMParallel(DDIM):
    """For DDIMParallelScheduler, whose step is DDIMScheduler's."""

    _output = ("schedulers.scheduling_ddim_parallel", "DDIMParallelSchedulerOutput")


class DDIMInverse(Alphas):
    """For DDIMInverseScheduler."""

    replaces = ("step",)
    initial_alpha_cumprod: Tensor
    _output = ("schedulers.scheduling_ddim_inverse", "DDIMSchedulerOutput")

    def _looked_at(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> tuple[tuple[FusedRows, float] | None, Any]:
        of = -self._stride(), self.initial_alpha_cumprod, 0.0, True
        place = self._place(timestep, sample, model_output, *of)
        taken = self._take_place(place, model_output, timestep, sample, None, return_dict, noisy=False)
        return (place[0], math.inf), taken
