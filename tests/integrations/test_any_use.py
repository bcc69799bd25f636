"""Accelerated objects of the tutorial's class: whatever was called before, they go on as the class itself."""

import numpy as np
import pytest
import torch
from support import eager_tutorial
from support.accelerated_tutorial import SHAPE, record_bars
from support.any_use import Subject, same_calls
from support.choices import for_many
from support.eager_tutorial import GaussianDiffusion
from torch import nn

from ddpm_ext import accelerate

TABLES = ("posterior_mean_coef1", "sqrt_recip_alphas_cumprod", "posterior_log_variance_clipped", "sqrt_alphas_cumprod")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, x, t):
        return torch.tanh(self.scale * x) + t.reshape(-1, 1, 1, 1) / 100


class Tutorial(Subject):
    """The object draws from torch's global generator."""

    def __init__(self, diffusion):
        super().__init__(diffusion)
        self.model = Net()

    def t(self, choose):
        return torch.tensor([choose.integer(0, 19, "t") for _ in range(SHAPE[0])])

    def do_loop(self, choose):
        return self.stacked(self.diffusion.p_sample_loop(self.model, SHAPE))

    def do_sample(self, choose):
        return self.stacked(self.diffusion.sample(self.model, 5, batch_size=choose.integer(1, 4, "batch_size")))

    def stacked(self, images):
        assert type(images) is list and all(type(image) is np.ndarray for image in images)
        return torch.from_numpy(np.stack(images))

    def do_step(self, choose):
        clip = choose.one_of([True, False], "clip")
        return self.diffusion.p_sample(self.model, self.normal(*SHAPE, seed=2), self.t(choose), clip_denoised=clip)

    def do_q_sample(self, choose):
        return self.diffusion.q_sample(self.normal(*SHAPE, seed=3), self.t(choose))

    def do_loss(self, choose):
        self.model.zero_grad()
        loss = self.diffusion.train_losses(self.model, self.normal(*SHAPE, seed=4), self.t(choose))
        loss.backward()
        return [loss.detach(), self.model.scale.grad.clone()]

    def do_change_of_a_table(self, choose):
        name, by_hand = choose.one_of(TABLES, "table"), choose.one_of([True, False], "in place")
        table = getattr(self.diffusion, name)
        table[3:6].mul_(0.99) if by_hand else setattr(self.diffusion, name, table * 0.99)


@for_many(60)
def test_any_calls(choose):
    dtype = choose.one_of([torch.float32, torch.float64], "dtype")
    ours, theirs = (GaussianDiffusion(20, "cosine", dtype) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        bars = record_bars(patch, eager_tutorial)
        ours = Tutorial(accelerate(ours))
        same_calls(choose, ours, Tutorial(theirs), 12, 1e-4)
    assert bars[::2] == bars[1::2] and ours.diffusion.accelerated.fallbacks == {}
