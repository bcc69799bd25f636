"""Every option of tuning changes the table and the errors, and the commands pass theirs on."""

import pytest
import torch
from support.every_option import Another, Same, check_has_value, entries, equal, keywords_of
from torch import nn

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Philox
from ddpm_ext.tables.step_table import COLUMNS
from ddpm_ext.tuning import Tuner, names, search, teacher, tune

GD, SHAPE = GaussianDiffusion(100), (2, 3, 2, 2)


class Net(nn.Module):
    """Predicts eps of wide data, by a product that autocast rounds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) + 0.1, requires_grad=False)

    def forward(self, x, t, y=0.0):
        level = GD.alphas_cumprod.float()[t.long()].reshape(-1, 1, 1, 1)
        mixed = torch.einsum("oc,bcij->boij", self.weight, x.float()).float()
        return ((1 - level).sqrt() * mixed / (1 + 3 * level) + y * level).to(x.dtype)


NET = Net()


def unconditional(x, t):
    return 0.8 * NET(x, t)


VALUES = {
    "steps": Another({"steps": 3}),
    "guidance": [Another({"guidance": Guidance(scale, unconditional)}) for scale in (1.5, 0.0)],
    "clip_denoised": [Another({"clip_denoised": clip}) for clip in (False, (-0.5, 0.75), DynamicThreshold(0.6))],
    "model_kwargs": Another({"model_kwargs": {"y": torch.full((2, 1, 1, 1), 0.5)}}),
    "device": Same({"device": "cpu"}, "the model is there, too"),
    "autocast": Another({"autocast": torch.bfloat16}),
    "input_dtype": Another({"input_dtype": torch.bfloat16}),
    "seeds": Another({"seeds": 4}),
    "rng": [Another({"rng": Philox(1)}), Another({"rng": Philox(0, sample_ids=50)})],
    "progress": Same({"progress": True}, "it shows a bar"),
}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer names, steps of the teacher and tries: other numbers, which depend on the options as much."""
    monkeypatch.setattr(names, "SAMPLERS", ("ddim", "dpmpp_2m"))
    monkeypatch.setattr(search, "EVALUATIONS", 2)
    monkeypatch.setattr(teacher, "STEPS", 20)


def numbers(tuned):
    """The table's columns, without the notes, and the errors."""
    report = tuned.report
    errors = [report.error, report.fitted_error, report.teacher_error, *(each.error for each in report.names)]
    return [{name: getattr(tuned.table, name) for name in COLUMNS}, errors]


BASE = {"steps": 2, "seeds": 2, "progress": False}


@pytest.fixture(scope="module")
def first():
    """What tuning finds with BASE, and no other option."""
    return {}


@pytest.mark.parametrize(("name", "entry"), entries(VALUES, keywords_of(tune)))
def test_another_value_is_seen_in_the_table_and_the_errors(first, name, entry):
    check_has_value(name, entry)
    if not first:
        first["numbers"] = numbers(tune(GD, NET, SHAPE, **BASE))
    table, errors = numbers(tune(GD, NET, SHAPE, **BASE | entry.given))
    for found, plain in zip((table, errors), first["numbers"], strict=True):
        assert equal(found, plain) is isinstance(entry, Same), name


def test_a_tuner_has_the_same_options(first):
    assert {*keywords_of(Tuner)} == {*keywords_of(tune)} - {"steps"}
    options = {"steps": 2, "seeds": 2, "progress": False, "rng": Philox(1), "autocast": torch.bfloat16}
    given = {name: value for name, value in options.items() if name != "steps"}
    assert equal(numbers(Tuner(GD, NET, SHAPE, **given).tune(2)), numbers(tune(GD, NET, SHAPE, **options)))
