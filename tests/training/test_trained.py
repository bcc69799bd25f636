"""training.load: samples of a trained module, of a UNet2DModel, and of a run that is not finished."""

import json
import shutil

import pytest
import torch
from support.refused import refused
from support.trainer_run import IMAGES, SIZES, Conditional, Squares, Tiny, assert_same, make, make_unet

from ddpm_ext import GaussianDiffusion, Guidance, Philox, training
from ddpm_ext.training import checkpoints

LOOP = {"sampler": "ddim", "steps": 5}


def test_module_samples_as_its_trainer_does(tmp_path):
    trainer = make(tmp_path / "run", steps=20, sample_count=6, sample_steps=5, seed=3)
    trainer.fit()
    expected, trained = trainer.sample(), training.load(tmp_path / "run", Tiny())
    assert trained.shape == (1, 8, 8) and trained.classes is None
    assert not trained.model.training and not any(value.requires_grad for value in trained.model.parameters())
    found = trained.sample(6, seed=3, **LOOP)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(trained.sample(2, seed=3, first=4, **LOOP), expected[4:], atol=1e-5)
    # The same by hand, as the page shows.
    loop = LOOP | {"rng": Philox(3), "record": "last", "progress": False}
    assert torch.equal(found, trained.settings.diffusion().p_sample_loop(trained.model, (6, *trained.shape), **loop))


def test_given_diffusion_is_the_runs(tmp_path):
    diffusion = GaussianDiffusion(5, torch.linspace(0.1, 0.5, 5), prediction="x0", variance="fixed_large")
    trainer = training.Trainer(Tiny(), diffusion, Squares(), tmp_path / "run", steps=2, batch_size=2, report=len)
    trainer.fit()
    assert trainer.diffusion is diffusion and trainer.options.timesteps == 5
    config = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert config["trained_betas"] == pytest.approx(diffusion.betas.tolist())
    loaded = training.load(tmp_path / "run", Tiny()).settings.diffusion()
    assert torch.equal(loaded.betas, diffusion.betas) and (loaded.prediction, loaded.variance) == ("x0", "fixed_large")


def test_unfinished_run_gives_its_newest_average(tmp_path):
    make(tmp_path / "run", steps=20).fit()
    for name in ("model.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    path = tmp_path / "run" / "options.json"
    begun = json.loads(path.read_text())
    # A device that this torch does not know, and a flag that nothing checked when the run was started.
    path.write_text(json.dumps(begun | {"options": begun["options"] | {"device": "npu:0", "skip_corrupt": 1}}))
    trained = training.load(tmp_path / "run", Tiny())
    average = checkpoints.with_prefix(checkpoints.load(checkpoints.newest(tmp_path / "run"))[0], "average.")
    assert_same(dict(trained.model.state_dict()), average)
    assert (trained.shape, trained.settings.timesteps) == ((1, 8, 8), SIZES["timesteps"])
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    refused(ValueError, "has no model and no checkpoint yet", training.load, tmp_path / "run", Tiny())


def test_classes_of_a_module(tmp_path):
    """Guidance is with the null class, unless it has an unconditional model of its own."""
    images = torch.utils.data.TensorDataset(IMAGES, torch.arange(6) % 3)
    options = {"data": images, "classes": True, "steps": 10, "sample_steps": 5}
    trainer = make(tmp_path / "run", model=Conditional(4), **options)
    trainer.fit()
    for _ in range(2):
        trained = training.load(tmp_path / "run", Conditional(4))
        assert (trained.classes.names, trained.classes.null) == (("0", "1", "2"), 3)
        assert torch.allclose(trained.sample(16, **LOOP), trainer.sample(), atol=1e-5)
        assert torch.allclose(trained.sample(3, first=4, **LOOP), trainer.sample()[4:7], atol=1e-5)
        one = trained.sample(3, classes=[1], **LOOP)
        assert torch.allclose(one[1], trainer.sample()[1], atol=1e-5)  # the sample of id 1 has class 1 there, too
        assert not torch.allclose(one[0], trainer.sample()[0], atol=1e-3)
        (tmp_path / "run" / "model.json").unlink(missing_ok=True)  # then from the checkpoint
    null = Guidance(3.0, lambda x, t: trained.model(x, t, torch.full((len(x),), 3)))
    for count in (1, 4):
        found = [trained.sample(count, guidance=guidance, **LOOP) for guidance in (Guidance(3.0), 3.0, null, None)]
        assert torch.equal(found[0], found[1])
        assert torch.allclose(found[0], found[2], atol=1e-5) and not torch.allclose(found[0], found[3], atol=1e-3)
    make(tmp_path / "without", model=Conditional(4), class_dropout=0.0, **options | {"steps": 2}).fit()
    with pytest.raises(ValueError, match="guidance: the model has no null class"):
        training.load(tmp_path / "without", Conditional(4)).sample(4, guidance=Guidance(3.0), **LOOP)


def test_unet_needs_no_module(tmp_path):
    pytest.importorskip("diffusers")
    trainer = make_unet(tmp_path / "run", sample_steps=5)
    trainer.fit()
    assert torch.allclose(training.load(tmp_path / "run").sample(16, **LOOP), trainer.sample(), atol=1e-5)
    refused(ValueError, "holds a UNet2DModel, expected no model=", training.load, tmp_path / "run", Tiny())
    shutil.rmtree(tmp_path / "run" / "unet")  # then from the checkpoint
    assert training.load(tmp_path / "run").shape == (1, 8, 8)
    tensors, header = checkpoints.load(checkpoints.newest(tmp_path / "run"))
    (tmp_path / "run" / "options.json").unlink()
    header["about"]["the shape of images"] = [1, 200_000, 200_000]
    checkpoints.save(tmp_path / "run", 2, tensors, header, keep=1)
    refused(ValueError, "has samples of 200000 by 200000, of which one takes", training.load, tmp_path / "run")


def test_refusals(tmp_path):
    refused(ValueError, "run: no such folder: ", training.load, tmp_path / "run", Tiny())
    make(tmp_path / "run", steps=2).fit()
    refused(ValueError, r"model: that of .* is a Tiny, expected model=, a module like", training.load, tmp_path / "run")
    message = r"model\.safetensors holds .* than the Tiny: into\.weight has shape \(6, .*, expected \(7, "
    refused(ValueError, message, training.load, tmp_path / "run", Tiny(width=7))
    refused(ValueError, r"the Conditional: of_class\.weight is mis", training.load, tmp_path / "run", Conditional())
    path = tmp_path / "run" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [1, 8]}))
    refused(ValueError, r"has samples of shape \[1, 8\], expected \[channels,", training.load, tmp_path / "run", Tiny())
