"""Schedulers of diffusers whose steps are written here as expressions of their own levels; see closed_rows.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ddpm_ext.integrations.diffusers import closed_flow as flow
from ddpm_ext.integrations.diffusers import closed_multistep as multistep
from ddpm_ext.integrations.diffusers.closed_factors import (
    WIDE,
    Factors,
    Form,
    Uncovered,
    clean_of,
    edm_of,
    levels_of,
    predicted_of,
    root_of,
    scales_of,
    slope_of,
    to_clean,
)
from ddpm_ext.integrations.diffusers.step_options import Beside, Options
from ddpm_ext.tables.trace_batch import Array
from ddpm_ext.tables.trace_run import GIVEN


@np.errstate(all="ignore")
def _euler(own: Any, first: int, is_ancestral: bool = False) -> Factors:
    """x + (x - x0) / sigma * (sigma' - sigma); ancestral, to sigma_down in place of sigma', and noise up to sigma'"""
    sigmas = levels_of(own.sigmas)[first:]
    sigma, to = sigmas[:-1], sigmas[1:]
    n, up = len(to), np.zeros(len(to))
    if is_ancestral:
        up = root_of(to**2 * (sigma**2 - to**2) / sigma**2)
        to = root_of(to**2 - up**2)
    clean, root = clean_of(own, sigma)
    x, m = (slope_of(clean, sigma) * (to - sigma).astype(WIDE)[:, None]).T
    return Factors(1 + x, m, up.astype(WIDE), clean, [is_ancestral] * n, scales_of(1 / root.astype(WIDE)))


@np.errstate(all="ignore")
def _edm_euler(own: Any, first: int) -> Factors:
    sigmas = levels_of(own.sigmas)[first:]
    sigma, dt = sigmas[:-1], (sigmas[1:] - sigmas[:-1]).astype(WIDE)
    clean, scales = edm_of(own, sigma)
    x, m = (slope_of(clean, sigma) * dt[:, None]).T
    return Factors(1 + x, m, np.zeros(len(x)), clean, [False] * len(x), scales_of(scales))


@np.errstate(all="ignore")
def _heun(own: Any, first: int) -> Factors:
    """An Euler step, and from its beginning one by the mean of two slopes"""
    if own.dt is not None or getattr(own.config, "clip_sample", False):
        raise Uncovered
    sigmas = levels_of(own.sigmas)[first:]
    dt = sigmas[1:] - sigmas[:-1]
    dt[1::2] = dt[:-1:2]
    return _in_two(own, sigmas[:-1], dt, 2, is_given=hasattr(own, "scale_model_input"))


@np.errstate(all="ignore")
def _kdpm2(own: Any, first: int, is_ancestral: bool = False) -> Factors:
    """An Euler step to the level between, and from its beginning one by the slope there"""
    if own.sample is not None:
        raise Uncovered
    n = len(own.timesteps) - first
    sigmas, between = (levels_of(x)[first : first + n + 1] for x in (own.sigmas, own.sigmas_interpol))
    i, j, shift = np.arange(0, n, 2), np.arange(1, n, 2), 0 if is_ancestral else 1
    # Where each step begins, the level of its slope, and where it ends
    begins, at, to, up = sigmas[:-1].copy(), sigmas[:-1].copy(), sigmas[:-1].copy(), np.zeros(n)
    begins[j], at[j], to[i] = sigmas[j - 1], between[j - 1 + shift], between[i + shift]
    if is_ancestral:
        to[j], up[j] = (levels_of(x)[first + j - 1] for x in (own.sigmas_down, own.sigmas_up))
    factors = _in_two(own, at, to - begins, 1, is_given=True)
    return factors._replace(s=up, draws=(np.arange(n) % 2 == 1).tolist()) if is_ancestral else factors._replace(dt=None)


def _in_two(own: Any, sigma: Array, dt: Array, parts: int, *, is_given: bool) -> Factors:
    """Of two steps each of lengths dt, the second one from the first one's sample, by 1 / parts of its own slope and
    the rest of that one's. is_given: whether steps return the clean sample, and a sample is scaled for the model."""
    (clean, root), n = clean_of(own, sigma), len(sigma)
    if n % 2 == 0:  # not of a loop from an end of two steps on
        raise Uncovered
    slope, lengths, past = slope_of(clean, sigma), dt[:, None].astype(WIDE), np.zeros((n, 1, 2))
    factors = slope * lengths
    factors[::2, 0] += 1
    factors[1::2] = slope[1::2] / parts * lengths[1::2]
    if parts > 1:
        past[1::2, 0] = slope[: n - 1 : 2] / parts * lengths[1::2]
    past[1::2, 0, 0] += 1
    x, m = factors.T
    given, scales = (clean, scales_of(1 / root.astype(WIDE))) if is_given else (None, None)
    return Factors(x, m, np.zeros(n), given, [False] * n, scales, past, period=2, dt=torch.from_numpy(dt))


@np.errstate(all="ignore")
def _consistency(own: Any, first: int) -> Factors:
    """To the clean sample of a consistency model, and up to the next level with noise, if there are several steps"""
    config, sigmas = own.config, torch.from_numpy(levels_of(own.sigmas)[first:])
    n = len(sigmas) - 1
    clean = torch.stack(own.get_scalings_for_boundary_condition(sigmas[:-1]), 1).numpy().astype(WIDE)
    up = sigmas[1:].clamp(config.sigma_min, config.sigma_max) ** 2 - config.sigma_min**2
    noisy = len(own.timesteps) > 1
    s = root_of(up.numpy()).astype(WIDE) * config.s_noise * noisy
    root = root_of((sigmas[:-1] ** 2 + config.sigma_data**2).numpy())
    factors = to_clean(np.zeros(n), s, np.ones(n), clean, [noisy] * n, (-1.0, 1.0) if config.clip_denoised else None)
    scales = scales_of(1 / root.astype(WIDE))
    return factors._replace(clean=None, scales=scales)


@np.errstate(all="ignore")
def _cogvideox_ddim(own: Any, first: int) -> Factors:
    """To the next level in sample and clean sample, without noise"""
    t, alphas = own.timesteps.numpy()[first:], own.alphas_cumprod.numpy()  # in float64
    following = t - own.config.num_train_timesteps // own.num_inference_steps
    alpha = alphas[t]
    after = np.where(following >= 0, alphas[following], own.final_alpha_cumprod.numpy())
    clean, _ = predicted_of(own, alpha)
    kept = root_of((1 - after) / (1 - alpha))
    of_clean = (root_of(after) - root_of(alpha) * kept).astype(WIDE)
    return to_clean(kept.astype(WIDE), 0 * of_clean, of_clean, clean, [0] * len(t))


@np.errstate(all="ignore")
def _tcd(own: Any, first: int) -> Factors:
    """To a level below the next one, without noise, and up to that one with noise, but for the last step: Zheng et al.
    2024, whose gamma is step's default here"""
    t, alphas = own.timesteps[first:], levels_of(own.alphas_cumprod)
    following = torch.cat([t[1:], t.new_zeros(1)])
    below = alphas[torch.floor((1 - 0.3) * following).long().numpy()]
    clean, noise = predicted_of(own, alphas[t.numpy()])
    reached = root_of(below).astype(WIDE)[:, None] * clean + root_of(1 - below).astype(WIDE)[:, None] * noise
    noisy = np.arange(first, first + len(t)) != own.num_inference_steps - 1
    share = alphas[following.numpy()] / below
    kept, added = np.where(noisy, root_of(share), 1).astype(WIDE), np.where(noisy, root_of(1 - share), 0).astype(WIDE)
    return Factors(kept * reached[:, 0], kept * reached[:, 1], added, reached, noisy.tolist(), is_one=(~noisy).tolist())


@np.errstate(all="ignore")
def _lcm(own: Any, first: int) -> Factors:
    """x0' = c_skip x + c_out x0, with noise again to the next level, but for the last step."""
    config = own.config
    if config.thresholding or config.clip_sample:
        raise Uncovered
    t, alphas = own.timesteps.numpy()[first:], levels_of(own.alphas_cumprod)
    following = np.append(t[1:], t[-1])
    after = np.where(following >= 0, alphas[following], own.final_alpha_cumprod.numpy())
    a, b = predicted_of(own, alphas[t])[0].T
    scaled = t.astype(np.float32) * np.float32(config.timestep_scaling)
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / root_of(scaled**2 + 0.25)
    a, b = c_out * a + c_skip, c_out * b
    noisy = np.arange(first, first + len(t)) != own.num_inference_steps - 1
    kept, added = np.where(noisy, root_of(after), 1).astype(WIDE), np.where(noisy, root_of(1 - after), 0).astype(WIDE)
    return Factors(kept * a, kept * b, added, np.stack([a, b], 1), noisy.tolist(), is_one=(~noisy).tolist())


@np.errstate(all="ignore")
def _unclip(own: Any, first: int, is_given_next: bool = False) -> Factors:
    """DDPM's posterior mean of the clean sample, and noise of the posterior's variance. A step goes to t - 1, whatever
    the loop's next timestep, unless it is given that."""
    config, t = own.config, own.timesteps[first:]
    if own.variance_type != "fixed_small_log" or config.variance_type != "fixed_small_log":
        raise Uncovered
    following = torch.cat([t[1:], t[-1:] - 1]) if is_given_next else t - 1
    alphas, is_next, noisy = torch.from_numpy(levels_of(own.alphas_cumprod)), following == t - 1, t > 0
    alpha, after = alphas[t], torch.where(following >= 0, alphas[following], own.one)
    beta = torch.where(is_next, own.betas[t], 1 - alpha / after)
    kept = torch.where(is_next, own.alphas[t], 1 - beta)
    variance = ((1 - after) / (1 - alpha) * beta).clamp(min=1e-20)
    factors = (
        kept**0.5 * (1 - after) / (1 - alpha),
        torch.where(noisy, (0.5 * variance.log()).exp(), 0),
        after**0.5 * beta / (1 - alpha),
    )
    x, s, of_clean = (values.numpy().astype(WIDE) for values in factors)
    clip = (-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else None
    return to_clean(x, s, of_clean, predicted_of(own, alpha.numpy())[0], noisy.tolist(), clip)


def _score_sde_ve(own: Any, first: int) -> Factors:
    """x + (sigma^2 - sigma'^2) score, which is the second tensor, and noise: the predictor of the SDE whose variance
    explodes"""
    times, sigmas = own.timesteps, levels_of(own.discrete_sigmas)
    places = (times[first:] * (len(times) - 1)).long().numpy()
    diffusion = root_of(sigmas[places] ** 2 - np.where(places == 0, 0, sigmas[places - 1]) ** 2)
    change, s = (diffusion**2).astype(WIDE), diffusion.astype(WIDE)
    clean = np.stack([0 * change + 1, change], 1)
    return Factors(clean[:, 0], change, s, clean, [True] * len(s))


@np.errstate(all="ignore")
def _score_sde_vp(own: Any, first: int) -> Factors:
    """x + dt beta (x / 2 + score), which is the second tensor, and noise: the predictor of the SDE that preserves the
    variance, whose score is the output divided by minus its standard deviation"""
    config, t, dt = own.config, own.timesteps[first:], 1 / len(own.timesteps)
    change = config.beta_max - config.beta_min
    beta = levels_of(config.beta_min + t * change)
    log_mean = -0.25 * t**2 * change - 0.5 * t * config.beta_min
    root = (1.0 - (2.0 * log_mean).exp()).sqrt().numpy().astype(WIDE)
    diffusion = root_of(beta)
    x, m = 1 + 0.5 * dt * beta.astype(WIDE), (diffusion**2).astype(WIDE) * (1 / root) * -dt
    s = (diffusion * np.float32(math.sqrt(dt))).astype(WIDE)
    return Factors(x, m, s, np.stack([x, m], 1), [True] * len(t))


def _consistency_decoder(own: Any, first: int) -> Factors:
    """To the clean sample of a consistency model, and up to the next level with noise, but for the last step"""
    t = own.timesteps.numpy()[first:]
    a, b, scales = (levels_of(x)[t].astype(WIDE) for x in (own.c_skip, own.c_out, own.c_in))
    next_levels = (levels_of(x)[t[1:]] for x in (own.sqrt_alphas_cumprod, own.sqrt_one_minus_alphas_cumprod))
    kept, added = (np.append(level, end).astype(WIDE) for level, end in zip(next_levels, (1, 0), strict=True))
    return Factors(kept * a, kept * b, added, None, (added != 0).tolist(), scales_of(scales))


def _wuerstchen(own: Any, first: int) -> Factors:
    """DDPM's posterior mean, and its noise but for a step to 0, of levels that follow a cosine from 0 to 1"""
    times = own.timesteps[first:]
    alphas = torch.from_numpy(levels_of(own._alpha_cumprod(times, times.device)))  # noqa: SLF001 (of diffusers)
    alpha, after, n = alphas[:-1], alphas[1:], len(times) - 1
    share = alpha / after
    factors = (
        (1.0 / share).sqrt(),
        1 - share,
        (1 - alpha).sqrt(),
        ((1 - share) * (1.0 - after) / (1.0 - alpha)).sqrt() * (times[1:] != 0),
    )
    x, change, root, s = (values.numpy().astype(WIDE) for values in factors)
    return Factors(x, -x * (change / root), s, None, [True] * n)


STEPS_READ = frozenset({"timesteps", "_internal_dict", "_step_index", "_begin_index"})
DPM = (
    "algorithm_type", "prediction_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final",
    "final_sigmas_type", "thresholding", "variance_type", "use_flow_sigmas",
)  # fmt: skip
DPM_READ = frozenset({"sigmas", "num_inference_steps", "model_outputs"})
COGVIDEOX_READ = frozenset(
    {"timesteps", "_internal_dict", "alphas_cumprod", "final_alpha_cumprod", "num_inference_steps"}
)
UNCLIP = Form(
    _unclip,
    ("prediction_type", "variance_type", "clip_sample", "clip_sample_range"),
    frozenset({"timesteps", "_internal_dict", "alphas_cumprod", "alphas", "betas", "one", "variance_type"}),
    None,
)
FORMS: Mapping[str, Form] = {
    "CogVideoXDDIMScheduler": Form(
        _cogvideox_ddim,
        ("prediction_type", "num_train_timesteps"),
        COGVIDEOX_READ,
        None,
        alike=True,
    ),
    "CMStochasticIterativeScheduler": Form(_consistency, ("clip_denoised",), STEPS_READ | {"sigmas"}),
    "ConsistencyDecoderScheduler": Form(
        _consistency_decoder,
        (),
        frozenset({"timesteps", "c_skip", "c_out", "c_in", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"}),
        None,
    ),
    "DDPMWuerstchenScheduler": Form(
        _wuerstchen,
        (),
        frozenset({"timesteps", "_internal_dict", "s", "scaler", "_init_alpha_cumprod"}),
        None,
        is_of_intervals=True,
    ),
    "DPMSolverMultistepInverseScheduler": Form(
        multistep.dpm_solver_multistep, DPM, (STEPS_READ | DPM_READ | {"lower_order_nums"}) - {"_begin_index"}
    ),
    "DPMSolverMultistepScheduler": Form(
        multistep.dpm_solver_multistep, DPM, STEPS_READ | DPM_READ | {"lower_order_nums"}
    ),
    "DPMSolverSinglestepScheduler": Form(multistep.dpm_solver_singlestep, DPM, STEPS_READ | DPM_READ | {"order_list"}),
    "EDMDPMSolverMultistepScheduler": Form(
        multistep.dpm_solver_multistep, DPM, STEPS_READ | DPM_READ | {"lower_order_nums"}
    ),
    "EDMEulerScheduler": Form(_edm_euler, ("prediction_type",), STEPS_READ | {"sigmas"}, alike=True),
    "EulerAncestralDiscreteScheduler": Form(
        functools.partial(_euler, is_ancestral=True), ("prediction_type",), STEPS_READ | {"sigmas"}
    ),
    "EulerDiscreteScheduler": Form(_euler, ("prediction_type",), STEPS_READ | {"sigmas"}, alike=True),
    "FlowMatchEulerDiscreteScheduler": Form(
        flow.flow_match_euler, ("stochastic_sampling",), STEPS_READ | {"sigmas"}, alike=True
    ),
    "FlowMapEulerDiscreteScheduler": Form(flow.flow_map_euler, (), STEPS_READ | {"sigmas"}, alike=True),
    "FlowMatchHeunDiscreteScheduler": Form(_heun, (), STEPS_READ | {"sigmas", "dt"}),
    "FlowMatchLCMScheduler": Form(
        flow.flow_match_lcm, (), STEPS_READ | {"sigmas", "_scale_factors", "_upscale_mode", "_init_size"}
    ),
    "HeunDiscreteScheduler": Form(_heun, ("prediction_type", "clip_sample"), STEPS_READ | {"sigmas", "dt"}),
    "IPNDMScheduler": Form(multistep.ipndm, (), STEPS_READ | {"alphas", "betas", "ets", "num_inference_steps"}),
    "KDPM2AncestralDiscreteScheduler": Form(
        functools.partial(_kdpm2, is_ancestral=True),
        ("prediction_type",),
        STEPS_READ | {"sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "sample"},
    ),
    "KDPM2DiscreteScheduler": Form(_kdpm2, ("prediction_type",), STEPS_READ | {"sigmas", "sigmas_interpol", "sample"}),
    "LCMScheduler": Form(
        _lcm,
        ("prediction_type", "thresholding", "clip_sample"),
        STEPS_READ | {"alphas_cumprod", "final_alpha_cumprod", "num_inference_steps"},
    ),
    "MiniMaxH3Scheduler": Form(flow.minimax, (), STEPS_READ | {"sigmas"}, alike=True),
    "PNDMScheduler": Form(
        multistep.pndm,
        ("prediction_type", "skip_prk_steps", "num_train_timesteps"),
        frozenset(
            {
                "timesteps",
                "_internal_dict",
                "counter",
                "ets",
                "alphas_cumprod",
                "final_alpha_cumprod",
                "num_inference_steps",
                "prk_timesteps",
            }
        ),
        "counter",
    ),
    "ScoreSdeVeScheduler": Form(_score_sde_ve, (), frozenset({"timesteps", "_internal_dict", "discrete_sigmas"}), None),
    "ScoreSdeVpScheduler": Form(_score_sde_vp, (), frozenset({"timesteps", "_internal_dict"}), None),
    "TCDScheduler": Form(_tcd, ("prediction_type",), STEPS_READ | {"alphas_cumprod", "num_inference_steps"}),
    "UnCLIPScheduler": UNCLIP,
}
# By the options with which pipelines call the steps.
WITH_OPTIONS: Mapping[tuple[str, Options], Form] = {
    ("CogVideoXDPMScheduler", (("old_pred_original_sample", GIVEN), ("timestep_back", Beside(-1)))): Form(
        multistep.cogvideox_dpm, ("prediction_type", "num_train_timesteps"), COGVIDEOX_READ, None
    ),
    ("UnCLIPScheduler", (("prev_timestep", Beside(1)),)): UNCLIP._replace(
        factors=functools.partial(_unclip, is_given_next=True)
    ),
}
