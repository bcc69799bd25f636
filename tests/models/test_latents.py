"""Models of latents: a DiT with an AutoencoderKL beside it, and training on precomputed latents."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.command_line import call, check_refused
from support.refused import refused

from ddpm_ext import models, training

diffusers = pytest.importorskip("diffusers")
DIT = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
LOOP = ("--num", 2, "--sampler", "ddim", "--steps", 3, "--spacing", "leading", "--quiet", "--out", "a.npz")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """diffusers' own folder of a DiT that also predicts its variance, "dit" in the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(**DIT, sample_size=4, out_channels=8)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=[4, 8], norm_num_groups=4, **blocks)
    diffusers.DiTPipeline(dit, vae, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained("dit")
    return tmp_path / "dit"


def edit(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def samples(*arguments):
    assert call("sample", *arguments, *LOOP) == 0
    with np.load("a.npz") as found:
        return dict(found)


def test_samples_are_those_of_diffusers(folder, monkeypatch, capsys):
    """Of its DiTPipeline, from the same noise with guidance; and a folder of many."""
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    np.save("noise.npy", noise.numpy())
    pipeline = diffusers.DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.pipelines.dit.pipeline_dit, "randn_tensor", lambda *_, **__: noise.clone())
    theirs = pipeline([5, 7], guidance_scale=2.0, num_inference_steps=3, output_type="np").images
    chosen = ("--model", folder, "--class", "5,7", "--guidance", 2, "--noise", "noise.npy")
    found = samples(*chosen)
    assert found["arr_0"].shape == (2, 8, 8, 3) and found["arr_1"].tolist() == [5, 7] and found["clip"] == "none"
    assert abs(found["arr_0"] - theirs * 255).max() < 1.5
    many = ("sample", *chosen, *LOOP[2:-1], "many", "--num-images", 2)
    assert call(*many) == 0
    assert abs(np.load("many/shards/000000000-000000001.npy").astype(int) - found["arr_0"]).max() <= 1
    edit(folder / "vae" / "config.json", {"shift_factor": 0.1})
    capsys.readouterr()
    check_refused(capsys, "vae_sha256 is ", *many)
    loaded = models.load_model(folder)
    assert (loaded.shape, loaded.image_shape, loaded.clip, loaded.classes.null) == ((4, 4, 4), (3, 8, 8), False, 1000)
    expected = pipeline.vae.decode(noise / 0.18215 + 0.1).sample
    torch.testing.assert_close(loaded.decoder(noise), expected, atol=1e-5, rtol=0)


BAD = [
    ("transformer", {"num_layers": 101}, "has num_layers 101, expected 1 to 100"),
    ("transformer", {"patch_size": 3}, "sample_size 4, expected a multiple of 3"),
    ("transformer", {"sample_size": 4096}, "samples of 4096 by 4096, of which one takes about .* GiB"),
    ("transformer", {"sample_size": 256, "num_layers": 100, "attention_head_dim": 2000}, "multiplications"),
    ("transformer", {"num_attention_heads": 2**14}, "GiB of weights, expected at most 8 GiB"),
    ("vae", {"layers_per_block": 51}, "layers_per_block 51 in 2 blocks, expected 1 to 100 layers"),
    ("vae", {"block_out_channels": [2**20, 2**20]}, "GiB of weights, expected at most 8 GiB"),
    ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "has up_block_types .*, expected UpDecoderBlock2D for"),
    ("vae", {"latent_channels": 3}, "has latent_channels 3, expected 4, as the denoiser"),
    ("vae", {"scaling_factor": 10**400}, "has scaling_factor 10*, expected a number below"),
]


def test_what_a_configuration_may_ask_for(folder):
    for part, changes, message in BAD:
        path = folder / part / "config.json"
        before = path.read_text()
        edit(path, changes)
        refused(ValueError, message, models.load_model, folder)
        path.write_text(before)


@pytest.mark.parametrize("dit", [True, False])
def test_training_on_latents(folder, capsys, dit):
    """By a DiT with classes, and by the U-Net of the options without; also from a checkpoint."""
    latents = 3 * torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    np.savez("latents.npz", latents.numpy().astype(np.float16), np.arange(6) % 2)
    (folder.parent / "dit.json").write_text(json.dumps(DIT))
    network = ("--model-config", "dit.json", "--classes") if dit else ("--widths", "8,8", "--groups", 4)
    options = ("train", "--data", "latents.npz", "--steps", 2, "--batch-size", 4, "--timesteps", 100, "--quiet")
    assert call(*options, *network, "--out", "run") == 0
    loaded = training.load("run")
    assert not loaded.clip and abs(loaded.sample(2, sampler="ddim", steps=3)).max() > 1
    if dit:  # labels are dropped by the trainer alone
        assert loaded.model.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob == 0
        assert loaded.classes == models.Classes(("0", "1"), 2) and not (folder.parent / "run/model_index.json").exists()
    capsys.readouterr()
    check_refused(capsys, "samples latents, expected their AutoencoderKL in run/vae", "sample", "--model", "run")
    shutil.copytree(folder / "vae", "run/vae")
    chosen = ("--model", "run", *(("--class", 1, "--guidance", 2) if dit else ()))
    found = samples(*chosen)["arr_0"]
    shutil.rmtree(folder.parent / "run" / ("transformer" if dit else "unet"))
    assert abs(samples(*chosen)["arr_0"].astype(int) - found).max() <= 1 and found.shape == (2, 8, 8, 3)
    capsys.readouterr()
    for arguments, message in (
        ((*options, "--out", "a", "--flip"), "flip: got True for latents, which are no pictures"),
        ((*options, "--out", "a", "--model-config", "dit.json"), "classes: dit.json describes a DiTTransformer2DModel"),
        (("sample", *chosen, "--start", "a.png"), "start: got a.png, but run samples"),
        (("trajectory", "--model", "run"), "model: run samples latents, expected a model of images"),
    ):
        check_refused(capsys, message, *arguments)
