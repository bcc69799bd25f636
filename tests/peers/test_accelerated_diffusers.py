"""Single steps of DDPM and DDIM, accelerated: of any configuration, against diffusers in float64; and what
is peculiar to them, one by one. The loops of all other schedulers are in test_accelerated_diffusers_traced.py."""

import importlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.accelerated_diffusers import compare, make, normal, prepared, seeded
from support.launches import launches
from torch import Tensor

from ddpm_ext.integrations import accelerate
from ddpm_ext.integrations.diffusers import scheduler as sched
from ddpm_ext.integrations.tensors import noise_arguments

pytestmark = pytest.mark.filterwarnings("ignore")  # what runs diffusers' own code says so; tested by name elsewhere

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 3, 8, 8), (2, 3, 5, 7), (3, 4, 33), (2, 2, 3, 4, 5), (4, 21), (1, 1, 1, 67))
LAYOUTS = ("contiguous", "channels_last", "every second", "transposed", "one for all")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

flag = st.booleans()
common = {
    "num_train_timesteps": st.sampled_from([1000, 60]),
    "beta_schedule": st.sampled_from(SCHEDULES),
    "rescale_betas_zero_snr": flag,
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "timestep_spacing": st.sampled_from(["linspace", "leading", "trailing"]),
    "steps_offset": st.integers(0, 1),
}
clipped = {"clip_sample": flag, "clip_sample_range": st.sampled_from([1.0, 0.5, 2, 1.3])}
threshold = {
    "thresholding": flag,
    "dynamic_thresholding_ratio": st.sampled_from([0.995, 0.9, 0.5, 1.0]),
    "sample_max_value": st.sampled_from([1.0, 1.5, 100.0, 0.7]),
}

variance_types = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
ddpm_configs = st.fixed_dictionaries(common | clipped | threshold | {"variance_type": st.sampled_from(variance_types)})
ddpm_configs |= ddpm_configs.map(lambda config: {**config, "beta_schedule": "sigmoid"})
ddim_configs = st.fixed_dictionaries(common | clipped | threshold | {"set_alpha_to_one": flag})
spacings = {"timestep_spacing": st.sampled_from(["leading", "trailing"])}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout; with "one for all", all samples are the first one."""
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "every second":
        return torch.stack([x, -x], -1)[..., 0]
    if layout == "transposed" and x.dim() > 2:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "one for all":
        return x[:1].expand(x.shape)
    return x


class Given(NamedTuple):
    """A step's tensors. dtypes: the sample's and the model output's."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    layouts: tuple[str, str]
    seed: int

    def x(self) -> Tensor:
        return laid_out(1.5 * normal(self.seed, *self.shape), self.layouts[0]).to(self.dtypes[0])

    def m(self, channels: int | None = None) -> Tensor:
        shape = (self.shape[0], channels or self.shape[1], *self.shape[2:])
        return laid_out(normal(self.seed + 1, *shape), self.layouts[1]).to(self.dtypes[1])

    def z(self) -> Tensor:
        return normal(self.seed + 2, *self.shape, dtype=self.dtypes[1])


def given_tensors() -> st.SearchStrategy[Given]:
    """Mostly of one dtype."""
    alike = st.sampled_from(FLOATS).map(lambda dtype: (dtype, dtype))
    dtypes = st.one_of(alike, alike, st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)))
    layouts = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
    return st.builds(Given, st.sampled_from(SHAPES), dtypes, layouts, st.integers(0, 10**6))


def mixes_halves(given: Given) -> bool:
    return set(given.dtypes) == {torch.float16, torch.bfloat16}


def in_schedule(name: str, config: dict[str, Any], steps: int) -> Any:
    """A scheduler with its timesteps set, or None where diffusers would refuse or go past the schedule's end."""
    scheduler = make(name, **config)
    train = scheduler.config.num_train_timesteps
    if steps > train:
        return None
    scheduler.set_timesteps(steps)
    inside = bool(((scheduler.timesteps >= 0) & (scheduler.timesteps < train)).all())
    return scheduler if inside else None


# ----------------------------------------------------------------------------------------------- any configuration

checks = [HealthCheck.filter_too_much, HealthCheck.too_slow]
many = settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=checks)
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
    ddim_configs, steps, parts, flag, kinds, st.sampled_from([0.0, 0.0, 0.3, 1, 1.0, 1.2]), flag, flag, given_tensors()
)
def test_ddim(config, steps, part, anywhere, kind, eta, clipped_output, with_noise, tensors):
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
    noise, options = tensors.z() if with_noise and eta else None, {"use_clipped_model_output": clipped_output}
    _, fused = compare("DDIM", scheduler, m, kind(t), x, noise=noise, eta=eta, **options)
    unclipped = has_no_x0(scheduler, t, clips_of(scheduler))
    own = eta > 1 or mixes_halves(tensors) or unclipped or odd_threshold(scheduler) or (end == 0 and eta > 0)
    assert fused != own


SHAPE = (2, 3, 4, 5)
X, M = (normal(i, *SHAPE) for i in range(2))


def test_the_next_sample_lies_where_its_noise_was_drawn(monkeypatch):
    """Unless somebody has replaced the function that draws, and may keep its results."""
    scheduler, drawn, draw = accelerate(prepared("DDPM")), [], torch.randn
    kept = {"noise": None}
    monkeypatch.setattr(sched, "noise_arguments", lambda z, x: kept.update(noise=z) or noise_arguments(z, x))
    t, z = scheduler.timesteps[3], normal(2, *SHAPE)
    assert scheduler.step(M, t, X, return_dict=False)[0].data_ptr() == kept["noise"].data_ptr()
    module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: drawn.append(draw(*X.shape)) or drawn[-1])
    prev = scheduler.step(M, t, X, return_dict=False)[0]
    assert len(drawn) == 1 and prev.data_ptr() != drawn[0].data_ptr()
    monkeypatch.undo()
    monkeypatch.setattr(torch, "randn", lambda *_, **__: z)
    before = z.clone()
    assert scheduler.step(M, t, X, return_dict=False)[0].data_ptr() != z.data_ptr()
    assert torch.equal(z, before)


# --------------------------------------------------------------------------------------- the ends of a schedule


@pytest.mark.parametrize("timesteps", [[77], [999, 998, 1, 0], [500, -5], [999, 10]])
def test_ddpm_goes_to_the_next_custom_timestep(timesteps):
    """Also from the last timestep to clean data, and from the one before a negative one. Far from the next one,
    1 - beta has no digits left, so alpha is read from the ratio itself."""
    for schedule in ("linear", "squaredcos_cap_v2"):
        plain = prepared("DDPM", timesteps, prediction_type="v_prediction", beta_schedule=schedule)
        for t in timesteps:
            if t >= 0:
                assert compare("DDPM", plain, M, t, 100 * X)[1]


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_epsilon_from_noise_alone(name):
    """With a clip, x0 is the sign of x - m; without one it is infinite, and diffusers' own code runs."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = accelerate(prepared(name, **config))
    assert scheduler.alphas_cumprod[999] == 0
    with launches() as called:
        found = scheduler.step(M, 999, X, generator=seeded(1))
    assert called
    assert torch.equal(found.pred_original_sample, (X - M).sign())
    assert not scheduler.step(X, 999, X).pred_original_sample.any()  # 0 / 0 there
    free, _ = compare(name, prepared(name, **config, clip_sample=False), M, 999, X)
    assert free.accelerated.fallbacks == {"step": "alphas_cumprod is 0 or 1 there, or does not rise"}


@pytest.mark.parametrize("name", ["DDPM", "DDIM"])
def test_epsilon_from_almost_noise_alone(name):
    """x0 is 3e5 times the difference of x and m, and within a clip only where they agree in five digits."""
    plain = prepared(name, 1000, beta_end=0.05)
    alpha = plain.alphas_cumprod[999].double()
    x = M + 1e-6 * X
    x_start = ((x.double() - (1 - alpha).sqrt() * M.double()) / alpha.sqrt()).clamp(-1, 1)
    with launches() as called:
        found = accelerate(plain).step(M, 999, x, generator=seeded(1)).pred_original_sample
    assert called and (found - x_start).abs().max() < 1e-5


def test_a_step_to_more_noise_is_no_number_and_runs_the_own_code():
    """Its variance is negative. With eta 0, the root of it is multiplied by 0, which is NaN."""
    for name, change in (("DDPM", {"timesteps": torch.tensor([100, 500])}), ("DDIM", {"final_alpha_cumprod": 0.9})):
        plain = prepared(name)
        vars(plain).update({key: torch.as_tensor(value) for key, value in change.items()})
        scheduler, fused = compare(name, plain, M, 100 if name == "DDPM" else 0, X)
        assert not fused and scheduler.accelerated.fallbacks


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "DDIMInverse", "DPMSolverMultistep"])
def test_numbers_that_are_none_stay_so(name):
    x = X.clone()
    x[0, 0, 0, 0] = torch.nan
    plain = prepared(name)
    assert compare(name, plain, M, int(plain.timesteps[3]), x)[1]
