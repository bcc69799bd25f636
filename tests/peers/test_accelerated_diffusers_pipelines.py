"""diffusers' pipelines before and after accelerate(pipeline) give the same images."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
)
from support.accelerated_diffusers import make, seeded
from support.diffusers_families import quiet, with_text
from support.launches import launches

from ddpm_ext.integrations import accelerate
from ddpm_ext.models.folder import DIGITS

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__:DeprecationWarning", "ignore::FutureWarning", "error:.*runs the own code:UserWarning"
)

LATENT = {"beta_schedule": "scaled_linear"}
SCHEDULERS = [
    ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("EulerAncestralDiscrete", {"timestep_spacing": "trailing"}),
]
schedulers = pytest.mark.parametrize("name, config", SCHEDULERS, ids=[name for name, _ in SCHEDULERS])


@pytest.fixture(autouse=True)
def one_thread(threads):
    """With models this small, threads would mostly wait for one another."""
    threads(1)


def arrays(images):
    return torch.as_tensor(np.stack([np.asarray(image, dtype=np.float64) for image in images]))


def close(found, expected, within=1e-4):
    """Checks that two are at most `within` apart, relative to the largest value: latents are larger than images."""
    found, expected = arrays(found), arrays(expected)
    assert found.shape == expected.shape
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=within * max(1.0, expected.abs().max().item()))


def test_ddpm_pipeline_by_seed_and_id():
    """It draws its start noise before set_timesteps, and takes no latents."""
    plain = quiet(DDPMPipeline(unet=UNet2DModel.from_pretrained(DIGITS), scheduler=make("DDPM")))
    whole, alone = (
        accelerate(plain, noise="philox", seed=1, sample_ids=i)(
            batch_size=2 - i, num_inference_steps=5, output_type="np"
        )
        for i in (0, 1)
    )
    close(alone.images, whole.images[1:])


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    pytest.importorskip("transformers")
    return with_text(make("DDIM", **LATENT), tmp_path_factory.mktemp("tokenizer"))


def with_scheduler(pipeline, name, config):
    """A pipeline of the same parts with another scheduler, and the same accelerated."""
    parts = {**pipeline.components, "scheduler": make(name, **{**LATENT, **config})}
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    plain = quiet(type(pipeline)(**parts, **extra))
    return plain, accelerate(plain)


PROMPT = {"prompt": ["a cat", "dogs"], "negative_prompt": ["bad", "odd"], "height": 16, "width": 16}


@pytest.mark.parametrize(
    "name, config", [*SCHEDULERS, ("UniPCMultistep", {}), ("PNDM", {"skip_prk_steps": True, "steps_offset": 1})]
)
def test_stable_diffusion(sd, name, config):
    """The callback edits latents in place, and returns others."""
    plain, ours = with_scheduler(sd, name, config)
    assert type(plain.scheduler) is not type(ours.scheduler)
    options = {"num_inference_steps": 6, "guidance_scale": 5.0, "guidance_rescale": 0.7, "output_type": "pil"}

    def run(pipeline):
        seen = []

        def callback(pipeline, i, t, kwargs):
            seen.append((i, float(t), kwargs["latents"].clone()))
            if i in (0, 2):
                kwargs["latents"].mul_(0.9)
            return {"latents": kwargs["latents"] * 0.9} if i == 3 else {}

        generators = [seeded(1), seeded(2)]
        return pipeline(**PROMPT, **options, generator=generators, callback_on_step_end=callback).images, seen

    expected, theirs = run(plain)
    with launches() as called:
        found, seen = run(ours)
    assert len(called) == len(seen)
    assert [(i, t) for i, t, _ in seen] == [(i, t) for i, t, _ in theirs]
    for (_, _, mine), (_, _, other) in zip(seen, theirs, strict=True):
        close(mine, other)
    close(found, expected, within=1 / 255)  # through the decoder


def test_another_scheduler_by_the_line_of_every_guide(sd):
    """It is accelerated with the settings of the one before, whose sample ids it goes on with. So are copies."""
    ours = accelerate(sd, noise="philox", seed=4)
    for cls in (EulerAncestralDiscreteScheduler, LCMScheduler):
        ours.scheduler = cls.from_config(ours.scheduler.config)
        assert ours.config.scheduler == ("diffusers", cls.__name__)
        with launches() as called:
            ours(**PROMPT, num_inference_steps=3, output_type="latent")
        assert len([name for name in called if name != "forward_process"]) == 3
    for each in (ours, copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(each) is type(ours)
        of_class = type(each.scheduler).from_config(each.scheduler.config, return_unused_kwargs=True)[0]
        each.scheduler = DDIMScheduler.from_config(each.scheduler.config)
        for scheduler in (of_class, each.scheduler):
            scheduler.set_timesteps(2)
            assert scheduler.accelerated.rng.seed_and_ids() == (4, 4)
    assert isinstance(sd.scheduler, DDIMScheduler) and "_acceleration" not in vars(sd.scheduler)
    refused = DDIMScheduler()
    refused.step = DDIMScheduler().step
    with pytest.warns(UserWarning, match="^scheduler runs the own code and noise of diffusers: obj has a step of its"):
        ours.scheduler = refused
    assert ours.scheduler is refused


def test_a_saved_pipeline_is_diffusers(sd, tmp_path):
    """One that is made of another's parts has its accelerated scheduler."""
    plain, ours = with_scheduler(sd, "EulerDiscrete", {})
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
        close(found, images[0])
    other = StableDiffusionImg2ImgPipeline.from_pipe(ours)
    assert type(other.scheduler) is type(ours.scheduler) is not type(plain.scheduler)
