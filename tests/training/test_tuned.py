"""TrainOptions.tune: step tables that a run writes at its end."""

import pytest
from support import trainer_run

from ddpm_ext import StepTable
from ddpm_ext.models import load_model
from ddpm_ext.models.folder import model_sha256
from ddpm_ext.training import TrainOptions, train, tuned
from ddpm_ext.tuning import names, search, teacher

pytest.importorskip("diffusers")

OPTIONS = trainer_run.UNET | {"timesteps": 100, "data": "shapes", "image_size": 8, "classes": True}


def test_tables_are_made_once_for_each_model(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "SAMPLERS", ("ddim",))
    for module, name, few in ((search, "EVALUATIONS", 2), (teacher, "STEPS", 20), (tuned, "_SEEDS", 4)):
        monkeypatch.setattr(module, name, few)
    path, lines = tmp_path / "tuned" / "1.json", []

    def run(**more):
        lines.clear()
        options = TrainOptions(**OPTIONS | {"tune": (1,)} | more)
        train(options, tmp_path, report=lines.append, resume=path.parent.exists())
        return StepTable.load(path).notes, any("tuning tables for 1 calls" in line for line in lines)

    notes, made = run()
    assert made and notes["model_sha256"] == model_sha256(load_model(tmp_path)) and notes["guidance"] is None
    assert run() == (notes, False)
    path.unlink()
    assert run() == (notes, True)  # and the same
    longer, made = run(steps=3)
    assert made and longer["model_sha256"] == model_sha256(load_model(tmp_path)) != notes["model_sha256"]


def test_wrong_options():
    for more in ({"tune": (0,)}, {"tune": (6,), "timesteps": 20}, {"tune": (6,), "variance": "learned_range"}):
        with pytest.raises(ValueError, match="tune: got "):
            TrainOptions(**more)
