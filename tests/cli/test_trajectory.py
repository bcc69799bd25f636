"""`ddpm-ext trajectory`: which steps its pictures show."""

import numpy as np
import pytest
import torch
from support.command_line import TINY, call

from ddpm_ext import Philox, models
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.plots.recorder import Recorder

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (("--num", 2, "--every", 5), 5),
        (("--spacing", "ddim5"), 5),
        (("--spacing", "2,4", "--every", 4), 3),
        (("--sampler", "heun", "--steps", 3), 4),
        (("--model", "digits", "--spacing", "karras", "--steps", 4), 4),
        (("--model", "shapes", "--sampler", "dpmpp_2m_cfg_pp", "--guidance", 2, "--steps", 6, "--every", 4), 3),
    ],
)
def test_trajectory_ends_with_the_last_step(tiny, tmp_path, options, frames, device):
    """The last model call is shown: of 20, 5, 6 and 4 calls, and of CFG++, whose 6 calls have 11 rows."""
    for ending, count in ((".gif", frames), (".png", 1)):
        out = tmp_path / f"a{ending}"
        given = ("--num", 1, "--device", device, *options, "--out", out, "--quiet")
        assert call("trajectory", "--model", tiny, *given) == 0
        with Image.open(out) as opened:
            assert getattr(opened, "n_frames", 1) == count and np.asarray(opened.convert("L")).std() > 1


def test_trajectory_is_that_of_the_samples(device):
    """The predicted x_0 of the last step is the sample, for every kind of prediction."""
    unet = models.build_unet(TINY | {"sample_size": 8}).to(device).eval()
    options = {"record": "last", "progress": False, "device": device}
    for prediction in ("eps", "x0", "v"):
        diffusion = DiffusionSettings(timesteps=20, prediction=prediction).diffusion()
        recorder = Recorder(unet, 6, 2)
        kept = {"x0": True, "callback": recorder.keep}
        with torch.no_grad():
            drawn = [
                diffusion.p_sample_loop(model, (3, 3, 8, 8), rng=Philox(1), **options | more)
                for model, more in ((unet, {}), (recorder, kept))
            ]
        assert torch.equal(*drawn) and recorder.labels() == ["t = 19", "t = 13", "t = 7", "t = 1", "t = 0"]
        assert [images.shape for images in recorder.x_t + recorder.x_0] == [(2, 3, 8, 8)] * 10
        assert np.allclose(recorder.x_0[-1], drawn[0][:2].cpu(), atol=1e-5)
