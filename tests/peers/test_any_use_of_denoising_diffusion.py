"""Accelerated objects of denoising-diffusion-pytorch: whatever was called before, they go on as the library's own."""

import pytest
import torch
from support.accelerated_denoising import OBJECTIVES, SHAPE, Net, make, peer
from support.accelerated_tutorial import record_bars
from support.any_use import Subject, same_calls
from support.choices import for_many

from ddpm_ext import accelerate

BUFFERS = ("posterior_mean_coef1", "sqrt_recip_alphas_cumprod", "loss_weight", "alphas_cumprod")


class Denoising(Subject):
    """The object draws from the global generators of torch and of Python."""

    def state(self):
        return [*super().state(), self.diffusion.model.calls]

    def do_sample(self, choose):
        self.diffusion.sampling_timesteps = choose.one_of([20, 7, 3], "sampling_timesteps")
        self.diffusion.is_ddim_sampling = self.diffusion.sampling_timesteps < 20
        self.diffusion.ddim_sampling_eta = choose.one_of([0.0, 0.6], "eta")
        return self.diffusion.sample(SHAPE[0], choose.one_of([False, True], "all"))

    @torch.no_grad()
    def do_step(self, choose):
        x = self.normal(*SHAPE, seed=2)
        return list(self.diffusion.p_sample(x, choose.integer(0, 19, "t")))

    def t(self, choose):
        return torch.tensor([choose.integer(0, 19, "t") for _ in range(SHAPE[0])])

    def do_q_sample(self, choose):
        return self.diffusion.q_sample(self.normal(*SHAPE, seed=3), self.t(choose))

    def do_loss(self, choose):
        strength = choose.one_of([None, 0.0, 0.3], "offset_noise_strength")
        loss = self.diffusion.p_losses(
            self.normal(*SHAPE, seed=4).sigmoid(), self.t(choose), offset_noise_strength=strength
        )
        self.diffusion.model.zero_grad()
        loss.backward()
        return [loss.detach(), self.diffusion.model.last.weight.grad.clone()]

    def do_interpolate(self, choose):
        t = choose.one_of([None, *range(1, 20)], "t")
        return self.diffusion.interpolate(*self.normal(2, *SHAPE, seed=5), t=t, lam=0.3)

    def do_change_of_a_buffer(self, choose):
        name, by_hand = choose.one_of(BUFFERS, "buffer"), choose.one_of([True, False], "in place")
        buffer = getattr(self.diffusion, name)
        buffer.mul_(0.99) if by_hand else setattr(self.diffusion, name, buffer * 0.99)

    def do_change_of_objective(self, choose):
        self.diffusion.objective = choose.one_of(OBJECTIVES, "objective")

    def do_load(self, choose):
        other = make(beta_schedule=choose.one_of(["cosine", "sigmoid"], "schedule"), timesteps=20)
        self.diffusion.load_state_dict(other.state_dict())


@for_many(60)
def test_any_calls(choose):
    options = {"offset_noise_strength": choose.one_of([0.0, 0.2], "offset"), "timesteps": 20}
    self_condition, objective = choose.one_of([False, True], "self_condition"), choose.one_of(OBJECTIVES, "objective")
    theirs, ours = (make(objective, Net(self_condition), **options) for _ in range(2))
    ours = Denoising(accelerate(ours))
    with pytest.MonkeyPatch.context() as patch:
        bars = record_bars(patch, peer)
        same_calls(choose, ours, Denoising(theirs), 12, 1e-4)
    assert bars[::2] == bars[1::2] and ours.diffusion.accelerated.fallbacks == {}
