"""Single steps of accelerated diffusers schedulers, of any configuration, against diffusers in float64."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.accelerated_diffusers import compare, make
from support.accelerated_diffusers_cases import (
    ddim_configs,
    ddim_inverse_configs,
    ddpm_configs,
    euler_ancestral_configs,
    euler_configs,
    flag,
    given_tensors,
    in_schedule,
    mixes_halves,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # what runs diffusers' own code says so; tested by name elsewhere

checks = [HealthCheck.filter_too_much, HealthCheck.too_slow]
many = settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
steps = st.sampled_from([1, 2, 7, 10, 20, 50])
kinds = st.sampled_from([int, torch.tensor, np.int64])
parts = st.floats(0, 1)


def at(part, length):
    return min(int(part * length), length - 1)


def has_no_x0(scheduler, t, clips):
    """Whether x0 is infinite, because it is predicted from noise alone."""
    return scheduler.config.prediction_type == "epsilon" and not clips and scheduler.alphas_cumprod[t] == 0


def is_none(scheduler, t, x, m):
    """Whether diffusers' x0 is NaN, from noise alone: 0 / 0, or a quantile of infinite values. Ours is a number."""
    return has_no_x0(scheduler, t, False) and (scheduler.config.thresholding or bool((x == m[:, : x.shape[1]]).any()))


def clips_of(scheduler):
    return scheduler.config.clip_sample or scheduler.config.get("thresholding", False)


def refused(scheduler, tensors):
    """Whether diffusers raises an error: its quantile needs more dimensions than channels."""
    return scheduler.config.get("thresholding", False) and len(tensors.shape) == 2


def odd_threshold(scheduler):
    return scheduler.config.thresholding and scheduler.config.sample_max_value < 1


@many
@given(ddpm_configs, st.one_of(steps, st.none(), st.just("custom")), parts, kinds, given_tensors())
def test_ddpm(config, steps, part, kind, tensors):
    scheduler = in_schedule("DDPM", config, steps) if isinstance(steps, int) else make("DDPM", **config)
    assume(scheduler is not None and not refused(scheduler, tensors))
    train = scheduler.config.num_train_timesteps
    if steps == "custom":
        scheduler.set_timesteps(timesteps=[train - 1, train // 2, train // 3, 4])
    t = int(scheduler.timesteps[at(part, len(scheduler.timesteps))])
    kind_of_variance = scheduler.config.variance_type
    learned = kind_of_variance in ("learned", "learned_range")
    m = tensors.m(tensors.shape[1] * (1 + learned))
    # from 1e-20 on, exp takes as many ulps as its exponent is large
    assume(not (kind_of_variance == "learned_range" and steps == "custom" and t == 4))
    if kind_of_variance == "learned":
        m = torch.cat([m[:, : tensors.shape[1]], m[:, tensors.shape[1] :].abs()], 1)
    unclipped = has_no_x0(scheduler, t, clips_of(scheduler))
    x = tensors.x()
    assume(not is_none(scheduler, t, x, m))
    _, fused = compare("DDPM", scheduler, m, kind(t), x)
    own = kind_of_variance == "fixed_large_log" or mixes_halves(tensors) or unclipped or odd_threshold(scheduler)
    assert fused != own


@many
@given(
    ddim_configs,
    steps,
    parts,
    flag,
    kinds,
    st.sampled_from([0.0, 0.0, 0.3, 1, 1.0, 1.2]),
    flag,
    flag,
    given_tensors(),
)
def test_ddim(config, steps, part, anywhere, kind, eta, use_clipped_model_output, with_noise, tensors):
    scheduler = in_schedule("DDIM", config, steps)
    assume(scheduler is not None and not refused(scheduler, tensors))
    timesteps = range(scheduler.config.num_train_timesteps) if anywhere else scheduler.timesteps
    t = int(timesteps[at(part, len(timesteps))])
    before = t - scheduler.config.num_train_timesteps // steps
    end = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
    x, m = tensors.x(), tensors.m()
    assume(not is_none(scheduler, t, x, m))
    # rounded below 0, its root is NaN; ours is 0
    assume(not 0 < eta <= 1 or 1 - end - (eta * scheduler._get_variance(t, before).sqrt()) ** 2 >= 0)
    _, fused = compare(
        "DDIM",
        scheduler,
        m,
        kind(t),
        x,
        noise=tensors.z() if with_noise and eta else None,
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
    )
    unclipped = has_no_x0(scheduler, t, clips_of(scheduler))
    own = eta > 1 or mixes_halves(tensors) or unclipped or odd_threshold(scheduler) or (end == 0 and eta > 0)
    assert fused != own


@many
@given(ddim_inverse_configs, steps, parts, kinds, given_tensors())
def test_ddim_inverse(config, steps, part, kind, tensors):
    scheduler = in_schedule("DDIMInverse", config, steps)
    assume(scheduler is not None)
    t = int(scheduler.timesteps[at(part, len(scheduler.timesteps))])
    before = t - scheduler.config.num_train_timesteps // steps
    start = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.initial_alpha_cumprod
    _, fused = compare("DDIMInverse", scheduler, tensors.m(), kind(t), tensors.x())
    clean = start == 1 and scheduler.config.prediction_type == "sample"
    assert fused != (mixes_halves(tensors) or clean)


def of_sigma(scheduler, at_step, tensors):
    scheduler._step_index = at_step
    scheduler.is_scale_input_called = True
    spread = (scheduler.sigmas[at_step] ** 2 + 1) ** 0.5
    return (tensors.x().float() * min(spread.item(), 2.0**12)).to(tensors.dtypes[0])


@many
@given(euler_configs(), steps, parts, st.sampled_from([0.0, 0.0, 0.0, 0.5, 40.0]), given_tensors())
def test_euler(config, steps, part, s_churn, tensors):
    scheduler = in_schedule("EulerDiscrete", config, steps)
    assume(scheduler is not None)
    at_step = at(part, steps)
    x = of_sigma(scheduler, at_step, tensors)
    t = scheduler.timesteps[at_step]
    _, fused = compare("EulerDiscrete", scheduler, tensors.m(), t, x, s_churn=s_churn)
    # Where churn's noise is part of the clean sample that a step returns, that is no row.
    churned = s_churn > 0 and scheduler.config.prediction_type != "sample"
    assert fused != (churned or mixes_halves(tensors))


@many
@given(euler_ancestral_configs, steps, parts, given_tensors())
def test_euler_ancestral(config, steps, part, tensors):
    scheduler = in_schedule("EulerAncestralDiscrete", config, steps)
    assume(scheduler is not None)
    at_step = at(part, steps)
    x = of_sigma(scheduler, at_step, tensors)
    _, fused = compare("EulerAncestralDiscrete", scheduler, tensors.m(), scheduler.timesteps[at_step], x)
    assert fused != mixes_halves(tensors)
