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
LOOP = ("--sampler", "ddim", "--steps", 3, "--spacing", "leading", "--quiet")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """diffusers' own folder of a DiT that also predicts its variance."""
    folder = tmp_path_factory.mktemp("model") / "dit"
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(**DIT, sample_size=4, out_channels=8)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=[4, 8], norm_num_groups=4, shift_factor=0.1, **blocks)
    diffusers.DiTPipeline(dit, vae, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "dit")


def samples(*arguments, out="a.npz"):
    assert call("sample", *arguments, *LOOP, "--out", out) == 0
    with np.load(out) as found:
        return dict(found)


def test_samples_are_those_of_diffusers(saved, tmp_path, monkeypatch):
    """Of its DiTPipeline, from the same noise; with guidance, by either command, and by hand."""
    monkeypatch.chdir(tmp_path)
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    np.save("noise.npy", noise.numpy())
    pipeline = diffusers.DiTPipeline.from_pretrained(saved)
    pipeline.vae.register_to_config(shift_factor=None)  # which this pipeline does not know
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(diffusers.pipelines.dit.pipeline_dit, "randn_tensor", lambda *_, **__: noise.clone())
    theirs = pipeline([5, 7], guidance_scale=2.0, num_inference_steps=3, output_type="np").images
    config = json.loads((saved / "vae" / "config.json").read_text())
    unshifted = shutil.copytree(saved, tmp_path / "unshifted")
    (unshifted / "vae" / "config.json").write_text(json.dumps(config | {"shift_factor": None}))
    chosen = ("--model", unshifted, "--class", "5,7", "--guidance", 2, "--noise", "noise.npy")
    found = samples(*chosen, "--num", 2)
    assert found["arr_0"].shape == (2, 8, 8, 3) and found["arr_1"].tolist() == [5, 7] and found["clip"] == "none"
    assert abs(found["arr_0"] - theirs * 255).max() < 1.5
    assert call("sample", *chosen, *LOOP, "--num-images", 2, "--out", "many", "--npz", "many.npz") == 0
    with np.load("many.npz") as many:
        assert abs(many["arr_0"].astype(int) - found["arr_0"]).max() <= 1
    loaded = models.load_model(saved)
    assert (loaded.shape, loaded.image_shape, loaded.clip, loaded.classes.null) == ((4, 4, 4), (3, 8, 8), False, 1000)
    expected = pipeline.vae.decode(noise / config["scaling_factor"] + 0.1).sample
    torch.testing.assert_close(loaded.decoder(noise), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"num_layers": 101}, "has num_layers 101, expected 1 to 100"),
        ("transformer", {"patch_size": True}, "has patch_size True"),
        ("transformer", {"patch_size": 3}, "sample_size 4, expected a multiple of 3"),
        ("transformer", {"sample_size": 4096}, "samples of 4096 by 4096, of which one takes about .* GiB"),
        ("transformer", {"sample_size": 256, "num_layers": 100, "attention_head_dim": 2000}, "multiplications"),
        ("transformer", {"num_attention_heads": 2**14}, "GiB of weights, expected at most 8 GiB"),
        ("transformer", {"out_channels": 5}, "5 output channels for 4 of input"),
        ("transformer", {"norm_type": "layer"}, "can't make a DiTTransformer2DModel"),
        ("transformer", {"num_embeds_ada_norm": 9}, "another architecture"),
        ("vae", {"block_out_channels": [8] * 600}, "1 in 600 blocks, expected 1 to 100 layers in all"),
        ("vae", {"block_out_channels": [2**20, 2**20]}, "GiB of weights, expected at most 8 GiB"),
        ("vae", {"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "has up_block_types .*, expected UpDecoderBlock2D"),
        ("vae", {"latent_channels": 3}, "has latent_channels 3, expected 4, as the denoiser"),
        ("vae", {"scaling_factor": 0}, "has scaling_factor 0, expected a finite number"),
        ("vae", {"_class_name": "VQModel"}, "describes a VQModel, expected an AutoencoderKL"),
        ("scheduler", {"clip_sample": "no"}, "has clip_sample 'no', expected true or false"),
    ],
)
def test_what_a_configuration_may_ask_for(folder, part, changes, message):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if changes.get("block_out_channels", [0])[0] == 8:
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 600, "up_block_types": ["UpDecoderBlock2D"] * 600}
        path.write_text(json.dumps(json.loads(path.read_text()) | blocks))
    refused(ValueError, message, models.load_model, folder)


@pytest.mark.parametrize("dit", [True, False])
def test_training_on_latents(saved, tmp_path, monkeypatch, capsys, dit):
    """By a DiT with classes, and by the U-Net of the options without; also from a checkpoint."""
    monkeypatch.chdir(tmp_path)
    latents = 3 * torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    np.savez("latents.npz", latents.numpy().astype(np.float16), np.arange(6) % 2)
    (tmp_path / "dit.json").write_text(json.dumps(DIT))
    of_dit = ("--model-config", "dit.json", "--classes")
    options = ("--data", "latents.npz", "--steps", 2, "--batch-size", 4, "--timesteps", 100, "--quiet", "--out", "run")
    network = of_dit if dit else ("--widths", "8,8", "--groups", 4)
    assert call("train", *options, *network, "--snapshot-every", 1) == 0
    loaded = training.load("run")
    assert not loaded.clip and abs(loaded.sample(2, sampler="ddim", steps=3)).max() > 1
    if dit:  # labels are dropped by the trainer alone, and a block begins as the identity
        embedding = loaded.model.transformer_blocks[0].norm1.emb.class_embedder
        assert (embedding.dropout_prob, embedding.embedding_table.num_embeddings) == (0, 3)
        assert models.load_model("run").classes == models.Classes(("0", "1"), 2)
    capsys.readouterr()
    check_refused(capsys, "samples latents, expected their AutoencoderKL in run/vae", "sample", "--model", "run")
    shutil.copytree(saved / "vae", "run/vae")
    chosen = ("--model", "run", "--num", 2, *(("--class", 1, "--guidance", 2) if dit else ()))
    found = samples(*chosen)["arr_0"]
    assert found.shape == (2, 8, 8, 3)
    assert call("average", "run", "--length", 0.1, "--out", "average") == 0 and not models.load_model("average").clip
    shutil.rmtree(tmp_path / "run" / ("transformer" if dit else "unet"))
    assert abs(samples(*chosen)["arr_0"].astype(int) - found).max() <= 1
    capsys.readouterr()
    for more, message in (
        (("--flip",), "flip: got True for latents, which are no pictures"),
        (("--image-size", 4), "image size: got 4 for latents"),
        (("--data", "noise.npz"), "data: cannot read noise.npz: No such file"),
        (of_dit[:2], "classes: dit.json describes a DiTTransformer2DModel, expected classes"),
    ):
        check_refused(capsys, message, "train", *options, *more, "--out", "other")
    check_refused(capsys, "start: got a.png, but run samples", "sample", *chosen, "--start", "a.png")
    check_refused(capsys, "model: run samples latents, expected a model of images", "trajectory", "--model", "run")
