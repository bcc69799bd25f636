"""ddpm_ext.models: diffusers' folders, the scheduler's settings, the digits model; damaged and unsupported files."""

import inspect
import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from support.command_line import TINY as OF_COLOURS
from support.refused import refused

from ddpm_ext import GaussianDiffusion, models
from ddpm_ext.models.folder import CONFIG, SCHEDULER, WEIGHTS
from ddpm_ext.models.scheduler import DiffusionSettings, clips, read_settings
from ddpm_ext.tables.schedules import sigma_space
from ddpm_ext.tables.variances import VARIANCES

diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")
TINY = OF_COLOURS | {"sample_size": 8, "in_channels": 1, "out_channels": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny model, written by save_model."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    models.save_model(models.build_unet(TINY), DiffusionSettings(timesteps=20), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, which a test may damage."""
    shutil.copytree(saved, tmp_path / "tiny")
    return tmp_path / "tiny"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_saved_folder_is_diffusers_own_layout(saved, device):
    theirs = diffusers.UNet2DModel.from_pretrained(saved).to(device)
    ours = models.load_model(saved, device=device)
    assert ours.unet.device == device
    x, t = torch.randn(3, 1, 8, 8, device=device), torch.tensor([0, 5, 19], device=device)
    # Close, not equal: the alignment of a tensor in memory can change the order of a sum.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):  # cuDNN's convolutions may round to TF32
        assert torch.allclose(ours.unet(x, t).sample, theirs(x, t).sample, atol=1e-5)
    assert (ours.shape, ours.unet.training, ours.settings.timesteps) == ((1, 8, 8), False, 20)
    assert not any(parameter.requires_grad for parameter in ours.unet.parameters())
    scheduler = diffusers.DDPMScheduler.from_pretrained(saved)
    assert torch.allclose(scheduler.betas.double(), ours.settings.diffusion().betas, rtol=1e-6)


def test_folder_saved_by_diffusers_loads(tmp_path):
    unet = diffusers.UNet2DModel(**TINY)
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDIMScheduler(beta_end=0.01, prediction_type="v_prediction"))
    pipeline.save_pretrained(tmp_path / "pipeline")
    unet.save_pretrained(tmp_path / "plain")
    whole, plain = (models.load_model(tmp_path / name) for name in ("pipeline", "plain"))
    assert whole.settings.prediction == "v" and whole.settings.diffusion().betas[-1] == 0.01
    assert plain.settings == DiffusionSettings()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    with torch.no_grad():
        for loaded in (whole, plain):
            assert torch.allclose(loaded.unet(x, t).sample, unet.eval()(x, t).sample, atol=1e-5)


def test_dtype(saved, tmp_path, device):
    loaded = models.load_model(saved, device=device, dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16 and loaded.unet.device == device
    models.save_model(loaded.unet, loaded.settings, tmp_path / "half", dtype=torch.float16)
    weights = safetensors_torch.load_file(tmp_path / "half" / WEIGHTS)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert next(models.load_model(tmp_path / "half").unet.parameters()).dtype == torch.float32


def test_sizes_are_checked_before_memory_is_taken(folder):
    edit(folder / CONFIG, block_out_channels=[2**21, 2**21])  # 40 TB in one convolution
    refused(ValueError, r"config\.json has .* GiB of weights, expected at most 8 GiB", models.load_model, folder)
    edit(folder / CONFIG, block_out_channels=[2**11, 2**11])
    refused(ValueError, r"another architecture .* has shape .*, expected", models.load_model, folder)
    edit(folder / CONFIG, block_out_channels=[8, 8], layers_per_block=2)
    refused(ValueError, r"another architecture .* is missing", models.load_model, folder)
    safetensors_torch.save_file({"weight": torch.zeros(3)}, folder / WEIGHTS)
    refused(ValueError, "another architecture", models.load_model, folder)


def test_weights_beyond_the_dtype(folder):
    """What is finite in the file may not be so in the dtype in which it is used."""
    for value, in_file, dtype, message in (
        (torch.nan, torch.float32, torch.float32, "not finite"),
        (1e300, torch.float64, torch.float32, "weights beyond float32, in conv_in.bias"),
        (1e5, torch.float32, torch.float16, "weights beyond float16, in conv_in.bias"),
        (1e5, torch.float32, torch.float32, None),
    ):
        weights = {name: value.to(in_file) for name, value in safetensors_torch.load_file(folder / WEIGHTS).items()}
        weights["conv_in.bias"][0] = value
        safetensors_torch.save_file(weights, folder / WEIGHTS)
        with pytest.raises(ValueError, match=rf"model: .*safetensors .*{message}") if message else nullcontext():
            models.load_model(folder, dtype=dtype)


def test_unet_folder_of_a_pipeline_has_its_scheduler(folder, tmp_path):
    pipeline, settings = tmp_path / "pipeline", DiffusionSettings(20, "cosine", "v", "fixed_large")
    models.save_model(models.load_model(folder).unet, settings, pipeline / "unet")
    (pipeline / "scheduler").mkdir()
    (pipeline / "unet" / SCHEDULER).rename(pipeline / "scheduler" / SCHEDULER)
    found = models.load_model(pipeline / "unet").settings
    assert found == models.load_model(pipeline).settings and (found.prediction, found.variance) == ("v", "fixed_large")
    assert "beta_schedule=<20 betas, " in repr(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "describes a UNet2DConditionModel, expected a UNet2DModel"),
        ({"time_embedding_type": "fourier"}, "Fourier time embeddings"),
        ({"out_channels": 3}, "3 output channels for 1 of input"),
        ({"sample_size": None}, "sample_size None"),
        ({"sample_size": 7}, "samples of 7 by 7, expected multiples of 2 for 2 blocks"),
        ({"sample_size": [2, 1]}, "samples of 2 by 1, expected multiples of 2"),
        ({"sample_size": 2048}, r"one takes about 5e\+13 multiplications in a call, expected at most 1e\+13"),
        ({"sample_size": 2**70}, "one takes about [0-9]* GiB, expected at most 8 GiB"),
        ({"downsample_padding": 100_000}, "downsample_padding 100000, expected 0 or 1"),
        ({"block_out_channels": [8] * 600, "layers_per_block": 100}, "100 in 600 blocks, expected 1 to 100 layers in"),
        ({"block_out_channels": "many"}, "makes no UNet2DModel"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity', expected null"),
        ({"num_class_embeds": 0}, "num_class_embeds 0, expected 1 to"),
        ("", r"config\.json is not readable JSON"),
        ("\udc80", r"config\.json is not readable JSON"),
    ],
)
def test_unsupported_configs(folder, changes, message):
    if isinstance(changes, str):
        (folder / CONFIG).write_bytes(changes.encode("utf-8", "surrogateescape"))
    else:
        edit(folder / CONFIG, **changes)
    refused(ValueError, message, models.load_model, folder)


def test_missing_files(folder, tmp_path):
    refused(ValueError, "no such folder: shaps; expected 'shapes', 'digits' or a folder in", models.load_model, "shaps")
    with pytest.raises(ValueError, match=r"; nothing is downloaded here: hf download some/small --local-dir small$"):
        models.load_model("some/small")
    (folder / "vqvae").mkdir()
    refused(ValueError, "latent space", models.load_model, folder)
    (folder / "vqvae").rmdir()
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    refused(ValueError, r"no such file: .*\.safetensors", models.load_model, folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    refused(ValueError, r"pickled weights \(diffusion_pytorch_model.bin\).*UNet2DModel.from", models.load_model, folder)
    (folder / CONFIG).unlink()
    refused(ValueError, r"no such file: .*config\.json", models.load_model, folder)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"beta_schedule": "sigmoid", "beta_end": 0.05},
        {"trained_betas": [0.1, 0.2, 0.5]},
        {"trained_betas": [0.1, 0.2, 0.5], "rescale_betas_zero_snr": True},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_schedules_are_diffusers(config):
    ours = torch.tensor(read_settings(config, "s").beta_schedule, dtype=torch.float64)
    theirs = diffusers.DDPMScheduler(**config).betas.double()  # 1 - alpha, rounded to float32
    assert torch.allclose(ours, theirs, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("variance", VARIANCES)
def test_variances_there_and_back(variance):
    """In diffusers "learned" is the variance itself; it has no name for the logarithm, and refuses its channels."""
    assert read_settings({"variance_type": "fixed_large_log"}, "s").variance == "fixed_large"
    config = DiffusionSettings(variance=variance).to_scheduler_config()
    assert read_settings(config, "s").variance == variance
    scheduler = diffusers.DDPMScheduler.from_config(config)
    x, output = torch.zeros(1, 3, 4, 4), torch.full((1, 6, 4, 4), 0.25)
    if variance == "learned_variance":
        assert (scheduler._get_variance(5, output[:, 3:]) == 0.25).all()
    if variance == "learned":
        with pytest.raises(RuntimeError):
            scheduler.step(output, 5, x)


def test_clip_sample_counts_where_diffusers_reads_it():
    for name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
        assert clips({"_class_name": name, "clip_sample": False}, "s") == (name == "PNDMScheduler")
        reads = "clip_sample" in inspect.signature(getattr(diffusers, name)).parameters
        assert reads == (name != "PNDMScheduler")


def test_bad_scheduler_configs():
    for config, message in (
        ({"_class_name": "ScoreSdeVeScheduler"}, "is for a ScoreSdeVeScheduler, expected one of DDPMScheduler"),
        ({"thresholding": True}, "has thresholding True, expected False; pass clip_denoised=DynamicThreshold"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "has shift 3.0, expected 1.0"),
        ({"clip_sample_range": 3.0}, r"has clip_sample_range 3.0, expected 1.0; pass clip_denoised=\(low, high\)"),
        ({"prediction_type": ["epsilon"]}, r"prediction_type \['epsilon'\], expected one of epsilon"),
        ({"beta_schedule": "laplace"}, "beta_schedule 'laplace', expected one of linear"),
        ({"num_train_timesteps": 20_000_000}, "num_train_timesteps 20000000, expected 1 to 1000000"),
        ({"beta_end": 2.0}, r"betas outside \(0, 1\]"),
        ({"beta_start": None}, "schedule that can't be read"),
    ):
        refused(ValueError, message, read_settings, config, "s")


@pytest.mark.parametrize(
    "settings",
    [
        DiffusionSettings(),
        DiffusionSettings(timesteps=40, beta_schedule="cosine", prediction="v", variance="fixed_large"),
        DiffusionSettings(timesteps=3, beta_schedule=(0.1, 0.2, 0.3), prediction="x0"),
        DiffusionSettings(timesteps=40, beta_schedule="flow", prediction="flow", variance="learned_range"),
    ],
)
def test_settings_survive_writing(settings):
    found = read_settings(json.loads(json.dumps(settings.to_scheduler_config())), "s")
    for name in ("timesteps", "prediction", "variance"):
        assert getattr(found, name) == getattr(settings, name)
    ours, theirs = settings.diffusion(), found.diffusion()
    assert torch.allclose(theirs.betas, ours.betas, rtol=1e-14)
    assert torch.allclose(theirs.schedule.noise, ours.schedule.noise, rtol=1e-12)
    assert torch.equal(DiffusionSettings.of(ours).diffusion().schedule.noise, ours.schedule.noise)


def test_settings_that_diffusers_lacks_are_refused_before_anything_is_written(saved, folder):
    unet = models.load_model(folder).unet
    unet.conv_in.bias.add_(1)
    refused(ValueError, "prediction is 'edm'", models.save_model, unet, DiffusionSettings(prediction="edm"), folder)
    for name in (WEIGHTS, CONFIG, SCHEDULER):
        assert (folder / name).read_bytes() == (saved / name).read_bytes()


def test_rectified_flow_is_a_scheduler_of_diffusers():
    config = DiffusionSettings(timesteps=50, beta_schedule="flow", prediction="flow").to_scheduler_config()
    sigmas = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config).sigmas
    ours = read_settings(config, "s").diffusion().schedule.noise
    torch.testing.assert_close(sigmas.double().flip(0), ours, rtol=1e-6, atol=0)
    for settings, message in (
        (DiffusionSettings(beta_schedule="flow"), "prediction is 'eps', expected 'flow' with beta_schedule 'flow'"),
        (DiffusionSettings(prediction="flow"), "prediction is 'flow', expected 'flow' with beta_schedule 'flow'"),
        (DiffusionSettings(prediction="edm"), "prediction is 'edm', expected one of eps"),
    ):
        refused(ValueError, message, settings.to_scheduler_config)
    with pytest.raises(ValueError, match="diffusion has a NoiseSchedule, expected"):
        DiffusionSettings.of(GaussianDiffusion(2, sigma_space(torch.tensor([1.0, 2]))))


def test_digits_model_draws_digits(device):
    """A light check of the weights: samples are near to real digits, and to at least 7 of the 10."""
    pytest.importorskip("sklearn")
    from ddpm_ext import Philox
    from ddpm_ext.training.data import digits

    loaded = models.load_model("digits", device=device)
    with torch.no_grad():
        drawn = loaded.settings.diffusion().p_sample_loop(
            loaded.unet, (32, 1, 8, 8), sampler="ddim", steps=50, rng=Philox(3), record="last", progress=False
        )
    images, labels = digits("train")
    assert drawn.device == device and loaded.settings.timesteps == 1000
    nearest = torch.cdist(drawn.cpu().flatten(1), images.flatten(1)).min(1)
    held_out = torch.cdist(digits("heldout")[0].flatten(1), images.flatten(1)).min(1)
    assert len(set(labels[nearest.indices].tolist())) >= 7
    # Random pixels with the mean and spread of each pixel are more than twice as far away.
    assert nearest.values.median() < 1.3 * held_out.values.median()
    assert nearest.values.median() > 0.7 * held_out.values.median()
