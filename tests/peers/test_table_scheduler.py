"""TableScheduler in pipelines of diffusers: the samples of a loop with its table, and of diffusers' own scheduler."""

import dataclasses
import json
import pickle
import warnings

import pytest
import torch
from support.refused import refused

pytest.importorskip("diffusers")

from diffusers import DDIMPipeline, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from support.accelerated_diffusers import make, normal, seeded
from support.diffusers_families import FAMILIES, embeds, of_pixels, quiet
from support.launches import Operators, launches
from support.warned import user_warnings

from ddpm_ext import GaussianDiffusion, Philox, StepTable, accelerate, randn
from ddpm_ext.integrations.diffusers.levels import levels_of
from ddpm_ext.integrations.diffusers.table_scheduler import TableScheduler
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.grid import grid_of_levels
from ddpm_ext.tables.levels import sigma_space
from ddpm_ext.tables.samplers import euler

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
GD = GaussianDiffusion(1000)
STEPS, SHAPE = 5, (2, 3, 8, 8)
NOTES = {"prediction": "eps", "clip": [-1.0, 1.0], "made": "by hand"}


def table_of(sampler="deis", diffusion=GD, **columns):
    table = make_loop_rows(diffusion, LoopOptions(sampler=sampler, steps=STEPS, spacing="trailing")).table
    return dataclasses.replace(table, notes=NOTES, **columns)


def samples(pipeline, **options):
    options = {"batch_size": 2, "generator": seeded(0), "num_inference_steps": STEPS, "output_type": "np"} | options
    return 2 * torch.from_numpy(pipeline(**options).images).permute(0, 3, 1, 2) - 1


@pytest.mark.parametrize("sampler, prediction", [("deis", "eps"), ("dpmpp_2m", "x0")])
def test_loop_pipeline_and_files_agree(tmp_path, sampler, prediction):
    """The clip is the one of the notes: this scheduler has none."""
    table = table_of(sampler, GaussianDiffusion(1000, prediction=prediction))
    plain = of_pixels(make("DDPM", clip_sample=False))
    table.save(tmp_path / "table.json")
    ours = accelerate(plain, table=tmp_path / "table.json")
    assert type(plain.scheduler).__name__ == "DDPMScheduler" and isinstance(ours.scheduler, TableScheduler)
    noise = torch.randn(SHAPE, generator=seeded(0))
    expected = GD.p_sample_loop(
        lambda x, t: plain.unet(x, t).sample, SHAPE, sampler=table, noise=noise, record="last", progress=False
    )
    with launches() as called:
        found = samples(ours)
    assert len(called) == STEPS
    torch.testing.assert_close(found, expected.clamp(-1, 1), rtol=0, atol=2e-6)
    assert torch.equal(samples(ours), found)  # what the first loop's rows kept is forgotten

    ours.save_pretrained(tmp_path / "first")
    back = quiet(DiffusionPipeline.from_pretrained(tmp_path / "first"))
    back.save_pretrained(tmp_path / "second")
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path / "second"))
    for pipeline in (back, again):
        assert pipeline.scheduler.table == table and pipeline.scheduler.table.notes == NOTES
        assert torch.equal(samples(pipeline), found)
    first, second = (tmp_path / name / "scheduler" / "scheduler_config.json" for name in ("first", "second"))
    assert json.loads(first.read_text()) == json.loads(second.read_text())
    other = TableScheduler.from_config(back.scheduler.config, table=table[:2])
    assert len(other.table) == 2 and other.config.prediction_type == "epsilon"
    assert torch.equal(samples(accelerate(plain, table=pickle.loads(pickle.dumps(back.scheduler)).table)), found)


@pytest.mark.parametrize("seeded_by", ["philox", "torch"])
def test_noise(seeded_by):
    """With "philox" it is the loop's; the draws of "torch" are diffusers'."""
    plain, table = of_pixels(make("DDPM")), table_of("sa_solver")
    if seeded_by == "torch":
        found = [samples(accelerate(plain, table=table), generator=seeded(i)) for i in (0, 0, 1)]
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        return
    scheduler, found = accelerate(plain, table=table, noise="philox", seed=7).scheduler, []
    for ids in (0, 2):
        scheduler.set_timesteps(STEPS)
        x = randn(SHAPE, Philox(7, ids), stream=1)
        for t in scheduler.timesteps:
            x = scheduler.step(plain.unet(x, t).sample, t, x, return_dict=False)[0]
        found.append(x)
    how = {"sampler": table, "record": "last", "progress": False}
    for ids, own in zip((0, 2), found, strict=True):
        expected = GD.p_sample_loop(lambda x, t: plain.unet(x, t).sample, SHAPE, rng=Philox(7, ids), **how)
        torch.testing.assert_close(own, expected, rtol=0, atol=2e-6)
    assert accelerate(scheduler, noise="philox", seed=3).accelerated.seed == 3 != scheduler.accelerated.seed


def test_16_bits():
    scheduler, m, x = TableScheduler(table_of()), normal(1, *SHAPE), normal(2, *SHAPE)
    exact = TableScheduler(table_of())
    for t in scheduler.timesteps:
        found = scheduler.step(m.half(), t, x.half())
        expected = exact.step(m.half().double(), t, x.half().double())
        assert found.prev_sample.dtype == torch.float16
        for own, other in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(own.double(), other, rtol=1e-2, atol=1e-2)
    assert scheduler.step_index == STEPS


def test_samples_of_sigma_space_are_those_of_diffusers():
    make_pipeline, arguments, steps = FAMILIES["stable_diffusion_xl"]
    plain = quiet(make_pipeline())
    own = plain.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config, timestep_spacing="trailing")
    own.set_timesteps(steps)
    sigmas = own.sigmas.double()
    table = euler(grid_of_levels(own.timesteps, torch.ones_like(sigmas), sigmas, scale=sigma_space))
    ours = accelerate(plain, table=table)
    torch.testing.assert_close(ours.scheduler.sigmas, own.sigmas)
    expected, found = (each(**arguments, generator=seeded(3)).images for each in (plain, ours))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    for dtype in (torch.float32, torch.float64):
        ours.scheduler.set_timesteps(steps)
        x, m = 9 * normal(0, 2, 3, 4, 5).to(dtype), normal(1, 2, 3, 4, 5).to(dtype)
        for i, t in enumerate(ours.scheduler.timesteps):  # The step wrote the next input, unless x was edited since.
            with Operators() as called:
                scaled = ours.scheduler.scale_model_input(x, t)
            assert len(called.names) == (i in (0, steps - 1))
            torch.testing.assert_close(scaled, x / (1 + sigmas[i] ** 2).sqrt().to(dtype))
            x = ours.scheduler.step(m, t, x).prev_sample
            if i == steps - 2:
                x.mul_(0.5)


def test_tables_of_traced_schedulers():
    """They clip as the scheduler does. A table does not have the factors of the model's input."""
    results = []
    for scheduler in (
        make("DDIM", clip_sample_range=0.5),
        TableScheduler(StepTable.trace(make("DDIM", clip_sample_range=0.5), 5)),
    ):
        scheduler.set_timesteps(5)
        x = normal(0, *SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin(), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    for name in ("EulerDiscrete", "LMSDiscrete", "EDMEuler"):
        with pytest.raises(ValueError, match="table is of a scheduler whose scale_model_input scales"):
            TableScheduler(StepTable.trace(make(name), 5))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "unipc", "sa_solver"])
def test_a_model_that_writes_each_output_into_one_tensor(sampler):
    """As a CUDA graph does. The rows are for a model that predicts x0, of whose outputs history consists."""
    table, results = table_of(sampler, GaussianDiffusion(1000, prediction="x0")), []
    table = dataclasses.replace(table, notes={})
    for buffer in (None, torch.empty(SHAPE)):
        scheduler, x = TableScheduler(table), normal(0, *SHAPE)
        for t in scheduler.timesteps:
            m = x.sin()
            x = scheduler.step(m if buffer is None else buffer.copy_(m), t, x, generator=seeded(1)).prev_sample
        results.append(x)
    assert torch.equal(*results)


def test_image_to_image():
    """A loop that begins in the middle, with samples at the row's level."""
    pipe = quiet(FAMILIES["stable_diffusion"][0]())
    pipe.scheduler = make("DDIM", beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    pipe.scheduler.set_timesteps(STEPS)
    table = euler(levels_of(pipe.scheduler, {}).grid())
    options = embeds("prompt_embeds", "negative_prompt_embeds") | {"image": normal(4, 2, 3, 16, 16).sigmoid()}
    options |= {"strength": 0.6, "num_inference_steps": STEPS, "output_type": "latent"}
    found = []
    for each in (pipe, accelerate(pipe, table=table)):
        parts = {**each.components, "requires_safety_checker": False}
        found.append(quiet(StableDiffusionImg2ImgPipeline(**parts))(**options, generator=seeded(1)).images)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3)


def test_a_pipeline_with_arguments_for_its_own_scheduler():
    plain = of_pixels(make("DDIM"), ddim=True)
    assert type(plain) is DDIMPipeline
    assert samples(accelerate(plain, table=table_of())).std() > 0.01
    refused(ValueError, "expected none with a table", samples, accelerate(plain, table=table_of()), eta=0.5)


def test_a_pipeline_takes_as_many_steps_as_its_table_has():
    """Where its call says none: its default, of 1000 or 50, is for other schedulers."""
    plain, table = of_pixels(make("DDPM")), table_of()
    ours = accelerate(plain, table=table)
    named = {"batch_size": 2, "output_type": "np"}
    found = torch.from_numpy(ours(**named, generator=seeded(0)).images)
    assert torch.equal(2 * found.permute(0, 3, 1, 2) - 1, samples(ours))
    for given in ({"num_inference_steps": 50}, {"args": (2, seeded(0), 50)}):
        refused(ValueError, "num_inference_steps is 50, expected 5", ours, *given.pop("args", ()), **given)
    scheduler_alone = of_pixels(make("DDPM"))
    scheduler_alone.scheduler = ours.scheduler
    refused(ValueError, "num_inference_steps is 1000, expected 5", scheduler_alone)


def test_a_table_of_another_guidance_or_shape_warns():
    """A plain pipeline with a TableScheduler knows the shape alone."""
    make_pipeline, arguments, _ = FAMILIES["stable_diffusion"]
    plain, options = quiet(make_pipeline()), arguments | {"num_inference_steps": STEPS}
    size = options["height"] // plain.vae_scale_factor
    notes = {"prediction": "eps", "guidance": 5.0, "shape": [4, size, size]}
    ours = accelerate(plain, table=dataclasses.replace(table_of(), notes=notes))
    scheduler_alone = quiet(make_pipeline())
    scheduler_alone.scheduler = ours.scheduler

    def said(pipeline, **more):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipeline(**options | more, generator=seeded(0))
        return [str(each.message).partition(":")[0] for each in user_warnings(caught)]

    of_guidance = "the table was made for guidance 5.0, and the pipeline's call has {}"
    of_shape = f"the table was made for shape [4, {size}, {size}], and the loop's samples have [4, {2 * size}, {size}]"
    taller = {"height": 2 * options["height"]}
    assert said(ours, guidance_scale=5) == said(scheduler_alone) == []
    assert said(ours, guidance_scale=9) == [of_guidance.format("9.0")]
    assert said(ours, guidance_scale=1) == [of_guidance.format("None")]
    assert said(ours, **taller) == [of_guidance.format("7.5"), of_shape]  # the default
    assert said(scheduler_alone, **taller) == [of_shape]
    of_digits = accelerate(of_pixels(make("DDPM")), table=table_of())
    refused(TypeError, "unexpected keyword argument 'guidance'", of_digits, guidance=3)


def test_refused():
    zeros, table = torch.zeros(STEPS), table_of()
    for names, what in (("cu", "unconditional output"), ("l1", "variance")):
        with pytest.raises(ValueError, match=f"reads the model's {what}"):
            TableScheduler(dataclasses.replace(table, **{names: zeros + 1}))
    refused(TypeError, "table is a list, expected a StepTable", TableScheduler, [1])
    refused(FileNotFoundError, "table is 'none.json', which is no file", TableScheduler, "none.json")
    threshold = dataclasses.replace(table, notes={"clip": "DynamicThreshold(0.9)"})
    refused(ValueError, "made for the clip DynamicThreshold", TableScheduler, threshold)
    refused(ValueError, "sample_max_value is 0.5", TableScheduler, table, thresholding=True, sample_max_value=0.5)
    flow = FAMILIES["stable_diffusion_3"][0]()
    with pytest.raises(ValueError, match=r"predicts 'eps', and that of .* FlowMatchEuler\w+ predicts 'flow'"):
        accelerate(flow, table=table)
    refused(TypeError, "table is given with a int", accelerate, 3, table=table)
    scheduler, x = TableScheduler(table), torch.zeros(SHAPE)
    refused(ValueError, "num_inference_steps is 50, expected 5", scheduler.set_timesteps, 50)
    refused(ValueError, "row 2 reads tensors that earlier rows stored", scheduler.step, x, scheduler.timesteps[2], x)
    scheduler.step(x, scheduler.timesteps[0], x)
    refused(ValueError, "timestep is 399, expected 799", scheduler.step, x, 399, x)
    for t in scheduler.timesteps[1:]:
        scheduler.step(x, t, x)
    refused(ValueError, "the loop of 5 rows is over", scheduler.step, x, 0, x)
    refused(ValueError, r"timesteps are \[3\],", scheduler.add_noise, x, x, torch.tensor([3]))
    unknown = StepTable(timestep=[1, 0], a=[1, 1], b=[0, 0], c0=[1, 1], c1=[0, 0])
    with pytest.raises(ValueError, match="levels"):
        TableScheduler(unknown).add_noise(x, x, torch.tensor([1]))
    assert not hasattr(TableScheduler(unknown), "sigmas") and TableScheduler(unknown).init_noise_sigma == 1
