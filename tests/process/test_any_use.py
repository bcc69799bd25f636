"""A GaussianDiffusion that lives longer than a call: each call does what it does by a new object, bit for bit."""

import itertools
import warnings

import torch
from support.any_use import Subject, same_calls
from support.choices import for_many

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.ops.loss_kinds import BOUNDS, LOSSES
from ddpm_ext.tables.predictions import PREDICTIONS
from ddpm_ext.tables.samplers import CFG_PP, SAMPLERS
from ddpm_ext.tables.schedules import SCHEDULES

SHAPES, CLIPS = ((3, 4, 2), (2, 3, 5, 7)), (True, False, (-0.5, 2.0))


def model(x, t, shift=0.0):
    t = torch.as_tensor(t, dtype=torch.float32)
    level = t.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() else t
    return torch.tanh(0.7 * x.float() + level / 300 + shift).to(x.dtype)


class Breaks:
    """A model whose call number `at` raises an error."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, x, t, shift):
        self.calls += 1
        if self.calls > self.at:
            raise KeyError("the model's own error")
        return model(x, t, shift)


class Diffusion(Subject):
    """The object, a loop that waits at a step, a captured loop, and a Philox whose seed somebody changes."""

    refusals = (ValueError,)  # of samplers between timesteps, by prediction="x_prev"

    def __init__(self, make):
        super().__init__(make())
        self.rng, self.waiting, self.captured = Philox(3), iter(()), None

    def random(self, choose, count):
        """The noise's address for `count` samples: the Philox that changes, another one, or torch's generator."""
        kind = choose.one_of(["the same", "its first", "ids", "torch"], "rng")
        ids = Philox(4, torch.arange(2 * count)[::2])
        return {"the same": self.rng, "its first": Philox(3), "ids": ids, "torch": None}[kind]

    def random_of_call(self, choose, count):
        """Those of `random`, and a Philox with another stream or draw, which loops refuse."""
        if choose.one_of([False, True], "address"):
            return Philox(3, stream=choose.one_of([None, 0, 2, 16], "stream"), draw=choose.one_of([None, 0, 7], "draw"))
        return self.random(choose, count)

    def loop(self, choose):
        shape, shift = choose.one_of(SHAPES, "shape"), choose.one_of([0.0, 0.3], "shift")
        options = {
            "sampler": choose.one_of([name for name in SAMPLERS if name not in CFG_PP], "sampler"),
            "steps": choose.integer(1, 4, "steps"),
            "dtype": choose.one_of([torch.float32, torch.bfloat16], "dtype"),
            "clip_denoised": choose.one_of(CLIPS, "clip_denoised"),
            "rng": self.random(choose, shape[0]),
        }
        return shape, {**options, "model_kwargs": {"shift": shift}}

    def do_loop(self, choose):
        shape, options = self.loop(choose)
        return self.diffusion.p_sample_loop(model, shape, record="last", progress=False, **options)

    def do_part_of_a_loop(self, choose):
        if choose.one_of([True, False], "a new one"):
            shape, options = self.loop(choose)
            self.waiting = self.diffusion.sample_progressive(model, shape, **options)
        return [record.x_t.clone() for record in itertools.islice(self.waiting, choose.integer(1, 4, "steps"))]

    def do_loop_that_breaks(self, choose):
        shape, options = self.loop(choose)
        breaks = Breaks(choose.integer(0, 2, "at"))
        try:
            self.diffusion.p_sample_loop(breaks, shape, record="last", progress=False, **options)
        except KeyError:
            return True

    def capture(self, shape, options):
        return self.diffusion.capture(model, shape, device="cpu", **options)

    def do_captured_loop(self, choose):
        if self.captured is None or choose.one_of([False, True], "a new one"):
            shape, options = self.loop(choose)
            kwargs = {"shift": torch.tensor(options["model_kwargs"]["shift"])}
            self.captured = self.capture(shape, {**options, "rng": Philox(9), "model_kwargs": kwargs})
        kwargs = {"shift": torch.tensor(choose.one_of([0.0, 0.5], "shift"))}
        kwargs = choose.one_of([None, kwargs, kwargs | {"of another model": torch.zeros(2)}], "model_kwargs")
        rng = Philox(choose.integer(0, 9, "seed"), choose.integer(0, 9, "first id"))
        try:
            return self.captured(rng, model_kwargs=kwargs)
        except ValueError as refusal:
            assert "expected tensors that were given when the loop was made" in str(refusal)

    def do_change_of_the_rng(self, choose):
        self.rng.seed_value, self.rng.first_id = choose.integer(3, 4, "seed"), choose.integer(0, 1, "first_id")

    def pair(self, choose):
        shape = choose.one_of(SHAPES, "shape")
        t = torch.tensor([choose.integer(0, 49, "t") for _ in range(shape[0])])
        return self.normal(*shape, seed=2), t

    def do_step(self, choose):
        x, t = self.pair(choose)
        clip = choose.one_of(CLIPS, "clip_denoised")
        return self.diffusion.p_sample(model, x, t, clip, rng=self.random_of_call(choose, len(x)))

    def do_q_sample(self, choose):
        x, t = self.pair(choose)
        return self.diffusion.q_sample(x, t, rng=self.random_of_call(choose, len(x)))

    def do_losses(self, choose):
        x, t = self.pair(choose)
        shift = torch.zeros((), requires_grad=True)
        options = {"loss": choose.one_of([*LOSSES, *BOUNDS], "loss"), "rng": self.random_of_call(choose, len(x))}
        if options["loss"] in LOSSES:
            options["weighting"] = choose.one_of(["simple", "min_snr", torch.linspace(1, 2, 50)], "weighting")
        loss = self.diffusion.train_losses(lambda x, t: model(x, t, shift), x, t, **options)
        loss.sum().backward()
        return [loss.detach(), shift.grad]


class New(Diffusion):
    """The same with a new object in each call, and a new loop in place of a captured one."""

    def __init__(self, make):
        super().__init__(make)
        self.make = make

    def call(self, name, choose):
        self.diffusion = self.make()
        return super().call(name, choose)

    def capture(self, shape, options):
        options |= {"record": "last", "progress": False}

        def loop(rng, model_kwargs):
            if model_kwargs is not None and len(model_kwargs) == 1:
                options["model_kwargs"] = model_kwargs
            samples = self.diffusion.p_sample_loop(model, shape, **{**options, "rng": rng})
            return None if model_kwargs is not None and len(model_kwargs) == 2 else samples

        return loop


@for_many(60)
def test_any_calls(choose):
    prediction = choose.one_of([*PREDICTIONS], "prediction")
    by_betas = not PREDICTIONS[prediction].any_step  # which the flow schedule has none of
    schedule = choose.one_of([name for name in SCHEDULES if not (by_betas and name == "flow")], "schedule")

    variance = choose.one_of(["fixed_small", "fixed_large"], "variance")
    backend = choose.one_of(["fused", "fused", "reference"], "backend")

    def make():
        return GaussianDiffusion(50, schedule, prediction=prediction, variance=variance, backend=backend)

    with warnings.catch_warnings(action="ignore"):  # capture() on the CPU
        same_calls(choose, Diffusion(make), New(make), 24, 0.0)
