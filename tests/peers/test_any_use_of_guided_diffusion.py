"""Accelerated objects of guided-diffusion and improved-diffusion: whatever was called before, they go on as the
library's own."""

import itertools

import torch
from support.accelerated_guided import (
    LIBRARIES,
    LOSSES,
    PREDICTIONS,
    SHAPE,
    VARIANCES,
    cond_fn,
    learned,
    make,
    model_of,
)
from support.any_use import Subject, same_calls
from support.choices import for_many

from ddpm_ext import accelerate

TABLES = ("posterior_log_variance_clipped", "posterior_mean_coef1", "sqrt_alphas_cumprod")


class Guided(Subject):
    """The object draws from torch's global generator alone."""

    def __init__(self, diffusion, library, variance, prediction):
        super().__init__(diffusion)
        self.variance, self.guided = variance, library == "guided_diffusion"
        self.from_x, self.follow_from_betas = prediction == "PREVIOUS_X", True
        self.x, self.model = self.normal(*SHAPE, seed=2), model_of(variance)

    def options(self, choose):
        options = {"model_kwargs": {"shift": choose.one_of([0.0, 0.1], "shift")}}
        options["clip_denoised"] = choose.one_of([True, False], "clip_denoised")
        if self.guided and choose.one_of([False, True], "cond_fn"):
            options["cond_fn"] = cond_fn
        return options

    def loop(self, choose, kind="_progressive"):
        name = choose.one_of(["p_sample_loop", "ddim_sample_loop"], "loop")
        options = self.options(choose)
        if name == "ddim_sample_loop" and not self.from_x:
            options["eta"] = choose.one_of([0.0, 0.5], "eta")
        return getattr(self.diffusion, name + kind)(self.model, SHAPE, device="cpu", **options)

    def do_loop(self, choose):
        return self.loop(choose, kind="")

    def do_progressive_loop(self, choose):
        *_, last = self.loop(choose)
        return [last["sample"], last["pred_xstart"]]

    def do_half_a_loop(self, choose):
        with torch.no_grad():
            return [out["sample"] for out in itertools.islice(self.loop(choose), choose.integer(1, 9, "steps"))]

    def t(self, choose):
        return torch.tensor([choose.integer(0, self.diffusion.num_timesteps - 1, "t") for _ in range(SHAPE[0])])

    @torch.no_grad()
    def do_step(self, choose):
        name = choose.one_of(["p_sample", "ddim_sample"], "step")
        out = getattr(self.diffusion, name)(self.model, self.x, self.t(choose), **self.options(choose))
        self.x = out["sample"]
        return [out["sample"], out["pred_xstart"]]

    def do_q_sample(self, choose):
        return self.diffusion.q_sample(self.normal(*SHAPE, seed=4).clamp(-1, 1), self.t(choose))

    def do_training_losses(self, choose):
        losses = self.diffusion.training_losses(self.model, self.normal(*SHAPE, seed=5).clamp(-1, 1), self.t(choose))
        return [list(losses), losses["loss"] is losses.get("mse"), *losses.values()]

    def do_change_of_a_table(self, choose):
        self.follow_from_betas = False
        name, by_hand = choose.one_of(TABLES, "table"), choose.one_of([True, False], "in place")
        if by_hand:
            getattr(self.diffusion, name)[3:6] *= 0.99
        else:
            setattr(self.diffusion, name, getattr(self.diffusion, name) * 0.99)

    def do_change_of_a_setting(self, choose):
        name, kinds = choose.one_of(["variance", "prediction", "rescale", "betas"], "setting"), self.diffusion
        if name == "variance":
            found = choose.one_of([kind for kind in VARIANCES if learned(kind) == learned(self.variance)], name)
            kinds.model_var_type = type(kinds.model_var_type)[found]
        elif name == "prediction":
            found = choose.one_of(PREDICTIONS, name)
            kinds.model_mean_type, self.from_x = type(kinds.model_mean_type)[found], found == "PREVIOUS_X"
        elif name == "rescale":
            kinds.rescale_timesteps = choose.one_of([False, True], name)
        elif not hasattr(kinds, "timestep_map"):
            same = {name: getattr(kinds, name) for name in ("model_mean_type", "model_var_type", "loss_type")}
            kinds.__init__(betas=0.9 * kinds.betas, **same)


@for_many(150)
def test_any_calls(choose):
    library, variance = choose.one_of(LIBRARIES, "library"), choose.one_of(VARIANCES, "variance")
    prediction, spacing = choose.one_of(PREDICTIONS, "prediction"), choose.one_of([None, "5,3,2"], "spacing")
    loss = choose.one_of(LOSSES, "loss")
    timesteps = 10 if spacing is None else 100

    def subject(of=lambda diffusion: diffusion):
        how = {"spacing": spacing, "timesteps": timesteps, "library": library, "schedule": "cosine"}
        diffusion = make(prediction, variance, loss, **how)
        return Guided(of(diffusion), library, variance, prediction)

    ours = subject(accelerate)
    same_calls(choose, ours, subject(), 12, 1e-4)
    assert not ours.follow_from_betas or ours.diffusion.accelerated.fallbacks == {}
