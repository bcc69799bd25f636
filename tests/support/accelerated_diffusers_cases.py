"""hypothesis strategies for the accelerated diffusers schedulers: configurations, timesteps, samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from support.accelerated_diffusers import make, normal
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 3, 8, 8), (2, 3, 5, 7), (3, 4, 33), (2, 2, 3, 4, 5), (4, 21), (1, 1, 1, 67))
LAYOUTS = ("contiguous", "channels_last", "every second", "transposed", "one for all")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

flag = st.booleans()
seeds = st.integers(0, 10**6)


def some(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(options)


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

ddpm_configs = some(
    **common,
    **clipped,
    **threshold,
    variance_type=st.sampled_from(
        ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
    ),
)
ddpm_configs |= ddpm_configs.map(lambda config: {**config, "beta_schedule": "sigmoid"})
ddim_configs = some(**common, **clipped, **threshold, set_alpha_to_one=flag)
ddim_inverse_configs = some(
    **{**common, "timestep_spacing": st.sampled_from(["leading", "trailing"])}, **clipped, set_alpha_to_one=flag
)


# --------------------------------------------------------------------------------------------------------- samples


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


def given_tensors(*, same: bool = False) -> st.SearchStrategy[Given]:
    """Mostly of one dtype; with `same`, always."""
    alike = st.sampled_from(FLOATS).map(lambda dtype: (dtype, dtype))
    dtypes = alike if same else st.one_of(alike, alike, st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)))
    layouts = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
    return st.builds(Given, st.sampled_from(SHAPES), dtypes, layouts, seeds)


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
