"""push_to_hub: the calls of diffusers' own methods, which are replaced here, so that nothing is uploaded."""

import json
from pathlib import Path

import pytest
import torch
from support.refused import refused
from support.trainer_run import IMAGES, Tiny, assert_same, make, make_unet

from ddpm_ext.models import load_model
from ddpm_ext.training import push_to_hub

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("huggingface_hub")


@pytest.fixture
def pushed(monkeypatch):
    """The uploads: the object, the repository, and the other arguments."""
    calls = []

    def push(self, repo_id, **given):
        calls.append((self, repo_id, given))
        return f"https://example.org/{repo_id}"

    for owner in (diffusers.DiffusionPipeline, diffusers.ModelMixin, diffusers.SchedulerMixin):
        monkeypatch.setattr(owner, "push_to_hub", push)
    return calls


def test_unet_is_pushed_as_its_pipeline(tmp_path, pushed):
    lines = []
    make_unet(tmp_path / "run", push_to_hub="me/flowers", hub_private=True, report=lines.append).fit()
    ((pipeline, repo, given),) = pushed
    assert (type(pipeline).__name__, repo) == ("DDPMPipeline", "me/flowers")
    assert given == {"private": True, "token": None}
    expected = load_model(tmp_path / "run").unet.state_dict()
    assert_same(pipeline.unet.state_dict(), expected)
    assert pipeline.scheduler.config.num_train_timesteps == 20
    assert lines[-1] == "uploaded to https://example.org/me/flowers"
    assert push_to_hub(tmp_path / "run", "again", token="secret") == "https://example.org/again"
    assert pushed[1][1:] == ("again", {"private": None, "token": "secret"})


def test_class_conditional_unet_is_pushed_with_its_classes(tmp_path, pushed, monkeypatch):
    import huggingface_hub

    files = []
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", lambda self, **given: files.append((self.token, given)))
    make_unet(tmp_path / "run", torch.utils.data.TensorDataset(IMAGES, torch.arange(6) % 3), classes=True).fit()
    assert pushed == []
    push_to_hub(tmp_path / "run", "flowers", token="secret")
    parts = [(type(part).__name__, given["subfolder"]) for part, _, given in pushed]
    assert parts == [("UNet2DModel", "unet"), ("DDPMScheduler", "scheduler")]
    assert pushed[0][0].config.num_class_embeds == 4
    ((token, given),) = files
    assert (token, given["path_in_repo"], given["repo_id"]) == ("secret", "unet/classes.json", "flowers")
    assert json.loads(Path(given["path_or_fileobj"]).read_text())["null"] == 3


def test_other_model_of_diffusers_has_its_own_method_called(tmp_path, pushed):
    class Wrapped(diffusers.ModelMixin, diffusers.ConfigMixin):
        config_name = "config.json"

        def __init__(self):
            super().__init__()
            self.net = Tiny()

        def forward(self, x, t):
            return self.net(x, t)

    trainer = make(tmp_path / "run", model=Wrapped(), steps=2, push_to_hub="flowers")
    trainer.fit()
    ((model, repo, _),) = pushed
    assert (model, repo) == (trainer.state.average, "flowers")


def test_upload_that_fails_leaves_the_model(tmp_path, monkeypatch):
    def fail(self, repo_id, **given):
        raise RuntimeError("401 Client Error:\nUnauthorized")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "push_to_hub", fail)
    with pytest.raises(ConnectionError, match=r"flowers can't be written \(401 Client Error: Unauthorized\); .*run"):
        make_unet(tmp_path / "run", push_to_hub="flowers").fit()
    assert (tmp_path / "run" / "training.json").is_file() and load_model(tmp_path / "run").shape == (1, 8, 8)
    with pytest.raises(ConnectionError, match=r"push_to_hub\('.*run', 'flowers', model=\.\.\.\) tries again"):
        push_to_hub(tmp_path / "run", "flowers", model=diffusers.DDPMPipeline.from_pretrained(tmp_path / "run"))


def test_refusals_come_before_training(tmp_path):
    refused(ValueError, "push_to_hub: a Tiny has no method push_to_hub,", make, tmp_path / "run", push_to_hub="flowers")
    assert not (tmp_path / "run").exists()
    make(tmp_path / "run", steps=2).fit()
    refused(ValueError, "run has no unet/ or transformer/, expected one", push_to_hub, tmp_path / "run", "flowers")
