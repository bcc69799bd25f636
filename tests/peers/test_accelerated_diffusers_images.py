"""Accelerated pipelines of Stable Diffusion for img2img and inpainting give the images of plain ones."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from support.accelerated_diffusers import make, normal, seeded
from support.diffusers_families import BOTH, HIDDEN, NO_CHECKER, NO_TEXT, STABLE_DIFFUSION, embeds, latent_parts, quiet

from ddpm_ext.integrations import accelerate

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
MASK = (torch.arange(16) < 8).float().expand(2, 1, 16, 16)
PIPELINES = {  # with the channels of its UNet; 9 are those of a model that was trained to inpaint
    "img2img": ("StableDiffusionImg2ImgPipeline", 4, {"strength": 0.6}),
    "inpaint": ("StableDiffusionInpaintPipeline", 4, {"mask_image": MASK, "height": 16, "width": 16}),
    "inpaint_model": ("StableDiffusionInpaintPipeline", 9, {"mask_image": MASK, "height": 16, "width": 16}),
}


@pytest.mark.parametrize("scheduler", ["PNDM", "DDIM", "EulerDiscrete", "UniPCMultistep", "DPMSolverMultistep"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_same_images(kind, scheduler):
    name, channels, options = PIPELINES[kind]
    parts = latent_parts(cross_attention_dim=HIDDEN, in_channels=channels) | NO_TEXT | NO_CHECKER
    own = {"skip_prk_steps": True} if scheduler == "PNDM" else {}
    plain = quiet(getattr(diffusers, name)(**parts, scheduler=make(scheduler, **STABLE_DIFFUSION, **own)))
    options = options | embeds(*BOTH) | {"image": normal(7, 2, 3, 16, 16).sigmoid(), "num_inference_steps": 8}
    fast = accelerate(plain)
    images, expected = (pipe(**options, output_type="pt", generator=seeded(3)).images for pipe in (fast, plain))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert fast.scheduler.accelerated.fallbacks == {}
