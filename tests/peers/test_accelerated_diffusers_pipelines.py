"""diffusers' pipelines before and after accelerate(pipeline) give the same images."""

import copy
import json
import pickle

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers import DDIMScheduler, DiffusionPipeline
from support.accelerated_diffusers import make, seeded
from support.diffusers_families import quiet, with_text
from support.launches import launches

from ddpm_ext import Philox
from ddpm_ext.integrations import accelerate, accelerated_class
from ddpm_ext.models.folder import DIGITS

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("error:.*runs the own code:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def test_ddpm_pipeline_by_seed_and_id():
    """It draws its start noise before set_timesteps, and takes no latents."""
    plain = quiet(diffusers.DDPMPipeline(unet=diffusers.UNet2DModel.from_pretrained(DIGITS), scheduler=make("DDPM")))
    how = {"num_inference_steps": 5, "output_type": "np"}
    whole, alone = (accelerate(plain, noise="philox", seed=1, sample_ids=i)(batch_size=2 - i, **how) for i in (0, 1))
    torch.testing.assert_close(alone.images, whole.images[1:], rtol=0, atol=1e-4)


class Halved(DDIMScheduler):
    """A step that a user wrote."""

    def step(self, model_output, *args, **kwargs):
        return super().step(model_output / 2, *args, **kwargs)


def test_a_traced_step_of_a_pipeline():
    """A user's step is proven in the pipeline's first loop, and rows take the second."""
    plain = quiet(diffusers.DDPMPipeline(unet=diffusers.UNet2DModel.from_pretrained(DIGITS), scheduler=Halved()))
    ours, how = accelerate(plain, trace=True), {"num_inference_steps": 3, "output_type": "np"}
    for fused in (0, 3):
        found, theirs = (pipe(generator=seeded(0), **how).images for pipe in (ours, plain))
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)
        assert ours.accelerated.fused_calls == fused


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    pytest.importorskip("transformers")
    return with_text(make("DDIM", beta_schedule="scaled_linear"), tmp_path_factory.mktemp("tokenizer"))


PROMPT = {"prompt": ["a cat", "dogs"], "negative_prompt": ["bad", "odd"], "height": 16, "width": 16}


def test_another_scheduler_by_the_line_of_every_guide(sd):
    """It is accelerated with the settings of the one before, whose sample ids it goes on with. So are copies."""
    ours = accelerate(sd, noise="philox", seed=4)
    for cls in (diffusers.EulerAncestralDiscreteScheduler, diffusers.LCMScheduler):
        ours.scheduler = cls.from_config(ours.scheduler.config)
        assert ours.config.scheduler == ("diffusers", cls.__name__)
        with launches() as called:
            ours(**PROMPT, num_inference_steps=3, output_type="latent")
        assert len([name for name in called if name != "forward_process"]) == 3
        assert ours.accelerated.fused_calls == 3  # those of the scheduler before it do not count
    for each in (ours, copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(each) is type(ours)
        for cls in (DDIMScheduler, accelerated_class(DDIMScheduler)):
            each.scheduler = cls.from_config(each.scheduler.config)
            each.scheduler.set_timesteps(2)
            assert each.scheduler.accelerated.rng.seed_and_ids() == (4, 4)
    assert isinstance(sd.scheduler, DDIMScheduler) and "_acceleration" not in vars(sd.scheduler)
    refused = DDIMScheduler()
    refused.step = DDIMScheduler().step
    with pytest.warns(UserWarning, match="^scheduler runs the own code and noise of diffusers: obj has a step of its"):
        ours.scheduler = refused
    assert ours.scheduler is refused
    for nothing in (refused, None):  # the next one goes on where the last accelerated one stood
        ours.scheduler = nothing
        ours.scheduler = DDIMScheduler()
        ours.scheduler.set_timesteps(2)
        assert ours.accelerated.rng.seed_and_ids() == (4, 4)
    ours.accelerated.rng = Philox(4, 9)
    del ours.scheduler
    ours.scheduler = DDIMScheduler()
    ours.scheduler.set_timesteps(2)
    assert ours.accelerated.rng.seed_and_ids() == (4, 9)


def test_a_saved_pipeline_is_diffusers(sd, tmp_path):
    """One that is made of another's parts has its accelerated scheduler."""
    plain = quiet(type(sd)(**sd.components | {"scheduler": make("EulerDiscrete")}, requires_safety_checker=False))
    ours = accelerate(plain)
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert "ddpm_ext" not in (tmp_path / "model_index.json").read_text()
    back = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(back.scheduler) is type(plain.scheduler)
    options = {"num_inference_steps": 3, "output_type": "latent"}
    given = quiet(DiffusionPipeline.from_pretrained(tmp_path, scheduler=ours.scheduler))
    assert given.scheduler is ours.scheduler
    images = [p(**PROMPT, **options, generator=seeded(0)).images for p in (plain, back, accelerate(back), given)]
    for found in images[1:]:
        torch.testing.assert_close(found, images[0], rtol=0, atol=1e-4 * images[0].abs().max().item())
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(ours)
    assert type(other.scheduler) is type(ours.scheduler) is not type(plain.scheduler)


def test_pipelines_that_its_class_makes(sd, tmp_path):
    """The class of an accelerated pipeline makes accelerated ones: of parts, of another pipeline, and of a folder."""
    plain = quiet(diffusers.DDPMPipeline(unet=diffusers.UNet2DModel.from_pretrained(DIGITS), scheduler=make("DDPM")))
    ours = accelerate(plain)
    ours.save_pretrained(tmp_path)
    made = type(ours)(**plain.components), type(ours).from_pretrained(tmp_path), type(accelerate(sd)).from_pipe(sd)
    for each, first in zip(made, (ours, ours, accelerate(sd)), strict=True):
        assert type(each) is type(first) and type(each.scheduler) is type(first.scheduler)
        assert each.accelerated.noise == "torch"
    assert type(plain.scheduler) is diffusers.DDPMScheduler
    options = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    images = [torch.from_numpy(quiet(p)(**options, generator=seeded(0)).images) for p in (plain, *made[:2])]
    for found in images[1:]:
        torch.testing.assert_close(found, images[0], rtol=0, atol=1e-4)
