"""Accelerated objects that live longer than a call: whatever was called before, they go on as the library's own."""

import functools
import inspect

import pytest
import torch

pytest.importorskip("diffusers")

from support.any_use import Subject, same_calls
from support.choices import for_many
from support.diffusers_classes import (
    ALONE,
    call_step,
    classes,
    make,
    set_timesteps,
    shape_of,
    step_of,
)

from ddpm_ext import accelerate

NAMES = [name for name in classes() if name not in ALONE]


class Scheduler(Subject):
    """A scheduler of diffusers. A generator goes on from loop to loop."""

    # Of diffusers: an index beyond the last step, methods and options that some classes lack, pickles of lambdas.
    refusals = (AssertionError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self.do_loop_begins(None)

    def state(self):
        index = vars(self.diffusion).get("_step_index")
        return [*super().state(), index, len(self.timesteps), torch.as_tensor(self.diffusion.timesteps)]

    def do_loop_begins(self, choose):
        scheduler, parameters = self.diffusion, inspect.signature(step_of(self.diffusion)).parameters
        fewest = 2 if type(scheduler).__name__ == "UnCLIPScheduler" else 1  # whose code divides by steps - 1
        self.timesteps = set_timesteps(scheduler, choose.integer(fewest, 8, "steps") if choose else 5)
        self.i, self.options = 0, {}
        if "generator" in parameters and (not choose or choose.one_of([True, False], "generator")):
            self.options["generator"] = self.generator
        if choose and "eta" in parameters:
            self.options["eta"] = choose.one_of([0.0, 0.7], "eta")
        if choose and hasattr(scheduler, "set_begin_index") and choose.one_of([False, False, True], "begin_index"):
            self.i = choose.integer(0, len(self.timesteps) - 1, "from")
            scheduler.set_begin_index(self.i)
        self.results = [(self.normal(*shape_of(scheduler), seed=2) * getattr(scheduler, "init_noise_sigma", 1.0),)]

    def do_steps(self, choose):
        scheduler, returned = self.diffusion, []
        for _ in range(choose.integer(1, 4, "steps")):
            if self.i == len(self.timesteps):
                break
            self.edit(choose)
            x, t = self.results[-1][0], self.timesteps[self.i]
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            m = self.normal(*x.shape, seed=3 + self.i) - (scaled / 4).clamp(-1, 1).to(x.dtype)
            noise = functools.partial(self.normal, *x.shape)
            previous = self.results[-1] if len(self.results) > 1 else None
            found = call_step(scheduler, self.i, m, x, previous, noise, **self.options)
            self.results.append(found if isinstance(found, tuple) else tuple(vars(found).values()))
            self.i += 1
            returned += [x.clone() if isinstance(x, torch.Tensor) else x for x in self.results[-1]]
        return returned

    def edit(self, choose):
        """What callbacks do to the sample between steps."""
        x, edit = self.results[-1][0], choose.one_of(["none", "none", "in place", "another tensor"], "edit")
        if edit == "in place":
            x.mul_(0.9)
        elif edit != "none":
            self.results[-1] = (0.9 * x, *self.results[-1][1:])

    def do_refused_timesteps(self, choose):
        with pytest.raises((TypeError, ValueError)):
            self.diffusion.set_timesteps("many")
        self.do_loop_begins(choose)  # the running loop may have lost its number of steps

    def do_add_noise(self, choose):
        x = self.results[-1][0]
        if hasattr(self.diffusion, "add_noise"):
            t = self.timesteps[choose.integer(0, len(self.timesteps) - 1, "at")]
            return self.diffusion.add_noise(x, self.normal(*x.shape), t.expand(len(x)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:step runs the own code")
def test_schedulers_of_diffusers(name):
    @for_many(6 if "KDPM2" in name else 40)  # whose own set_timesteps takes a tenth of a second
    def any_calls(choose):
        plain = make(name)
        same_calls(choose, Scheduler(accelerate(plain)), Scheduler(plain), 12, 1e-4)

    any_calls()
