"""Accelerated pipelines after any earlier calls go on as the library's own, and a TableScheduler as a new one."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from support.accelerated_diffusers import make
from support.any_use import Subject, same_calls
from support.choices import for_many
from support.diffusers_families import BOTH, OF_16, STABLE_DIFFUSION, embeds, quiet, stable_diffusion

from ddpm_ext import GaussianDiffusion, accelerate
from ddpm_ext.integrations.diffusers.table_scheduler import TableScheduler
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
SCHEDULERS = ("DDIM", "DDPM", "DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "PNDM", "UniPCMultistep")


class Pipeline(Subject):
    """Stable Diffusion, whose scheduler is replaced by a new one and by earlier ones."""

    refusals = (ValueError,)  # PNDM's, for fewer than four steps

    def __init__(self, pipe):
        super().__init__(pipe)
        self.earlier = [pipe.scheduler]

    def call_pipeline(self, choose, callback=None):
        generator = self.generator if choose.one_of([True, False], "generator") else None
        more = {"num_inference_steps": choose.integer(2, 4, "steps"), "guidance_scale": choose.one_of([1.0, 4.0], "w")}
        options = embeds(*BOTH) | OF_16 | more | {"callback_on_step_end": callback}
        return self.diffusion(**options, generator=generator).images

    def do_call(self, choose):
        return self.call_pipeline(choose)

    def do_call_with_a_callback(self, choose):
        at, edit = choose.integer(0, 1, "at"), choose.one_of(["interrupt", "scale", "scale in place"], "edit")

        def callback(pipe, step, t, tensors):
            if step == at and edit == "interrupt":
                pipe._interrupt = True
            elif step == at:
                x = tensors["latents"]
                tensors["latents"] = x.mul_(0.9) if edit == "scale in place" else 0.9 * x
            return tensors

        return self.call_pipeline(choose, callback)

    def do_call_that_breaks(self, choose):
        at = choose.integer(0, 1, "at")

        def breaks(pipe, step, t, tensors):
            if step == at:
                raise KeyError("the caller's own error")
            return tensors

        with pytest.raises(KeyError):
            self.call_pipeline(choose, breaks)

    def do_another_scheduler(self, choose):
        kind = getattr(diffusers, f"{choose.one_of(SCHEDULERS, 'class')}Scheduler")
        self.diffusion.scheduler = kind.from_config(self.diffusion.scheduler.config)
        self.earlier.append(self.diffusion.scheduler)

    def do_earlier_scheduler(self, choose):
        self.diffusion.scheduler = self.earlier[choose.integer(0, len(self.earlier) - 1, "which")]


@for_many(30)
def test_pipelines(choose):
    plain = quiet(stable_diffusion(scheduler=make("DDIM", **STABLE_DIFFUSION)))
    same_calls(choose, Pipeline(accelerate(plain)), Pipeline(plain), 8, 1e-4)


GD = GaussianDiffusion(1000)
TABLES = [
    make_loop_rows(GD, LoopOptions(sampler=sampler, steps=steps)).table
    for sampler, steps in (("ddpm", 4), ("unipc", 5), ("euler", 5), ("dpmpp_3m", 6), ("plms", 4))
]


class Table(Subject):
    """A TableScheduler, which gets timesteps as numbers."""

    refusals, by_tensors = (ValueError,), False

    def loop(self, first, last):
        scheduler, x = self.diffusion, self.normal(2, 3, 4, 4, seed=2)
        scheduler.set_timesteps(None)
        if first:
            scheduler.set_begin_index(first)
        for t in scheduler.timesteps[first:last]:
            m = torch.tanh(0.7 * scheduler.scale_model_input(x, t)) + t / 3000
            x = scheduler.step(m, t if self.by_tensors else t.item(), x, generator=self.generator).prev_sample
        return x

    def do_loop(self, choose):
        return self.loop(choose.one_of([0, 2], "begin index"), None)

    def do_part_of_a_loop(self, choose):
        return self.loop(0, choose.integer(1, 3, "steps"))

    def do_refused_timesteps(self, choose):
        with pytest.raises(ValueError, match=r"expected .*, the rows of the table"):
            self.diffusion.set_timesteps(99)


class NewTable(Table):
    """The same with a new object in each call, which gets timesteps as tensors."""

    by_tensors = True

    def __init__(self, table):
        super().__init__(TableScheduler(table))
        self.table = table

    def call(self, name, choose):
        self.diffusion = TableScheduler(self.table)
        return super().call(name, choose)


@for_many(100)
def test_table_schedulers(choose):
    table = choose.one_of(TABLES, "table")
    same_calls(choose, Table(TableScheduler(table)), NewTable(table), 12, 0.0)
