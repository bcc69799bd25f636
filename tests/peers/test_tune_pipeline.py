"""tune_pipeline: tables fitted by running pipelines with small models are nearer to many steps than names."""

import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from support.refused import refused

pytest.importorskip("diffusers")

from support.accelerated_diffusers import make, seeded
from support.diffusers_families import FAMILIES, of_pixels, quiet

from ddpm_ext import accelerate
from ddpm_ext.integrations import tune_pipeline
from ddpm_ext.integrations.diffusers import tune_pipeline as module
from ddpm_ext.integrations.diffusers.levels import levels_of
from ddpm_ext.tables.samplers import SAMPLERS

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
FEW = {"steps": 4, "teacher_steps": 40, "seeds": 2, "progress": False}
LEVELS = {"stable_diffusion": 1.0, "stable_diffusion_xl": 14.61, "stable_diffusion_3": 1.0, "flux": 1.0, "wan": 1.0}


def test_a_pipeline_of_pixels():
    pipe = of_pixels(make("DDPM"))
    scheduler, calls = pipe.scheduler, []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    tuned = tune_pipeline(pipe, batch_size=4, **FEW)
    hook.remove()
    report = tuned.report
    assert report.model_calls == len(calls)
    assert pipe.scheduler is scheduler and scheduler.num_inference_steps is None
    assert report.fitted and report.error < 0.8 * report.best.error and report.seeds == report.held_out == 8
    assert {each.sampler for each in report.names} == {"unipc", "dpmpp_2m", "deis"}  # its own adds noise
    assert 0 < report.names_calls < report.model_calls - report.names_calls
    assert tuned.table.notes["prediction"] == "eps" and tuned.table.notes["clip"] == [-1.0, 1.0]

    # Another seed than any that it has seen, against many steps of another sampler.
    def images(sampler, steps):
        pipe.scheduler.set_timesteps(steps)
        table = SAMPLERS[sampler](levels_of(pipe.scheduler, {}).grid()) if sampler else tuned.table
        ours = accelerate(pipe, table=replace(table, notes=tuned.table.notes))
        return torch.from_numpy(ours(4, generator=seeded(99), num_inference_steps=steps, output_type="np").images)

    truth = images("euler", 200)
    near, *far = ((images(name, 4) - truth).square().mean().sqrt() for name in (None, "unipc", "dpmpp_2m"))
    assert near < 0.6 * min(far)


def test_a_scheduler_with_more_levels_than_steps():
    """PNDM's Runge-Kutta steps, of which a bare scheduler has some. Names take evenly spaced levels of the teacher."""
    tuned = tune_pipeline(of_pixels(make("PNDM")), batch_size=4, **FEW)
    assert [each.spacing for each in tuned.report.names] == ["even"] * 3
    assert tuned.report.fitted and tuned.report.error < 0.8 * tuned.report.best.error


@pytest.mark.parametrize("name", LEVELS)
def test_families(name):
    make_pipeline, arguments, _ = FAMILIES[name]
    call = {key: value for key, value in arguments.items() if key != "num_inference_steps"}
    pipe = quiet(make_pipeline())
    tuned = tune_pipeline(pipe, **FEW, **call)
    assert tuned.report.fitted and tuned.report.error < 0.8 * tuned.report.best.error
    if name == "stable_diffusion_3":
        assert tune_pipeline(pipe, **FEW, **call).table == tuned.table
    guidance = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
    assert tuned.table.notes["guidance"] == guidance  # which the call has, though nobody gave it
    ours = accelerate(pipe, table=tuned.table)
    assert ours.scheduler.init_noise_sigma == pytest.approx(LEVELS[name], rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as for a table of another guidance or shape
        assert ours(**arguments | {"num_inference_steps": 4}, generator=seeded(5))[0].std() > 0.05


def test_the_best_name_where_no_fit_is_nearer(monkeypatch):
    pipe = of_pixels(make("DDIM", timestep_spacing="trailing"))

    def poor(runs, levels, *_):
        return module._table(runs, "euler", levels.grid([0, 1, 2, 3])), 0.0

    monkeypatch.setattr(module, "_fit", poor)
    tuned = tune_pipeline(pipe, batch_size=2, **FEW)
    report = tuned.report
    assert not report.fitted and report.error == report.best.error < report.fitted_error
    assert "no fit is nearer" in tuned.table.notes["made"]
    assert any(each.sampler == "DDIMScheduler" for each in report.names)
    accelerate(pipe, table=tuned.table)(num_inference_steps=4)


def test_refused():
    pipe = of_pixels(make("DDPM"))
    refused(ValueError, "generator is given, but is chosen here", tune_pipeline, pipe, generator=seeded(0), **FEW)
    refused(ValueError, "teacher_steps is 15", tune_pipeline, pipe, **FEW | {"teacher_steps": 15})
    with pytest.raises(TypeError, match="expected a pipeline of diffusers with a scheduler of diffusers"):
        tune_pipeline(pipe.scheduler, **FEW)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1e3)
    refused(ValueError, "the teacher has not converged", tune_pipeline, pipe, batch_size=2, **FEW)
