"""`ddpm-ext table`: what it prints, saves and draws, and its messages for wrong input."""

import json

import pytest
from support.command_line import call, check_refused, grid_of
from support.figure_contents import drawn, points, saved_figures

from ddpm_ext import StepTable
from ddpm_ext.tables.samplers import ddim, dpmpp_2m, euler


@pytest.fixture
def scheduler(tmp_path):
    """A folder with a pipeline's scheduler, and the scheduler."""
    made = pytest.importorskip("diffusers").DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    made.save_pretrained(tmp_path / "pipeline" / "scheduler")
    return tmp_path / "pipeline", made


def test_a_sampler_is_saved_and_compared(tmp_path, capsys):
    mine, ours = tmp_path / "new" / "mine.json", euler(grid_of(5))
    assert call("table", "--sampler", "euler", "--steps", 5, "--save", mine) == 0 and StepTable.load(mine) == ours
    assert call("table", "--sampler", "euler", "--steps", 5, "--diff", mine) == 0
    assert capsys.readouterr().out == f"{ours}\nno difference\n"
    options = ("--steps", 4, "--spacing", "trailing", "--eta", 0.5, "--prediction", "v", "--beta-schedule", "cosine")
    assert call("table", "--sampler", "ddim", *options, "--diff", mine) == 0
    assert capsys.readouterr().out == f"{ddim(grid_of(4, 'trailing', 'cosine'), prediction='v', eta=0.5).diff(ours)}\n"


def test_a_spacing_within_a_name_is_that_of_its_table_alone(capsys):
    given = ("DPM++ 2M Leading",), ("dpmpp_2m", "--spacing", "leading"), ("dpmpp_2m",)
    for name, other in zip(("Euler linspace", "euler", "Euler Leading"), given, strict=True):
        assert call("table", "--sampler", name, "--steps", 5, "--diff", *other) == 0
    pairs = ("linspace", "leading"), ("leading", "leading"), ("leading", "trailing")
    expected = [f"{euler(grid_of(5, one)).diff(dpmpp_2m(grid_of(5, other)))}\n" for one, other in pairs]
    assert capsys.readouterr().out == "".join(expected)


def test_a_scheduler_is_traced(scheduler, tmp_path, capsys):
    folder, made = scheduler
    expected = StepTable.trace(made, 5)
    for given in (folder, folder / "scheduler", folder / "scheduler" / "scheduler_config.json"):
        assert call("table", "--scheduler", given, "--steps", 5, "--save", tmp_path / "a.json") == 0
        assert capsys.readouterr().out == f"{expected}\n" and StepTable.load(tmp_path / "a.json") == expected
    assert call("table", "--sampler", "ddim", "--steps", 5, "--diff", folder) == 0
    assert capsys.readouterr().out == f"{ddim(grid_of(5)).diff(expected)}\n"


def test_a_flow_is_shifted(tmp_path, capsys):
    made = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    made.save_pretrained(tmp_path)
    assert call("table", "--scheduler", tmp_path, "--steps", 4, "--mu", -0.5) == 0
    assert capsys.readouterr().out == f"{StepTable.trace(made, 4, mu=-0.5)}\n"


def test_tables_are_drawn(tmp_path, monkeypatch):
    saved = saved_figures(monkeypatch)
    assert call("table", "--sampler", "euler", "--steps", 4, "--diff", "dpmpp_2m", "--plot", tmp_path / "b.svg") == 0
    one, other = euler(grid_of(4)), dpmpp_2m(grid_of(4))
    last = next(axes for axes in saved[0].axes if axes.get_title().startswith("h1,"))
    assert drawn(last) == {"euler": points(range(4), one.h1), "dpmpp_2m": points(range(4), other.h1)}


BAD = [
    (("--steps", "3"), "one of the arguments --sampler --scheduler is required"),
    (("--sampler", "euler", "--save", "a.txt"), "save: got a.txt, expected a name that ends in .json"),
    (("--scheduler", "nowhere", "--steps", "20"), "scheduler: got nowhere, expected a folder of diffusers"),
    (("--sampler", "euler", "--diff", "nowhere", "--steps", "20"), "table: got nowhere, expected a name such as '"),
    (("--sampler", "dpmpp_4m"), "sampler is 'dpmpp_4m', expected a name such as 'dpmpp_3m', 'dpmpp_2m'"),
    (("--sampler", "Euler Karras", "--spacing", "beta"), "got beta, but the name of the sampler has karras"),
    (
        ("--sampler", "euler", "--diff", "Euler Karras", "--spacing", "beta"),
        "spacing is 'beta' with sampler 'euler ka",
    ),
    (("--sampler", "euler", "--mu", "1"), "mu: got 1.0, but there is no scheduler that it is for"),
    (("--scheduler", "."), "table: . has no scheduler_config.json, nor has its scheduler/, expected one of them"),
    (("--scheduler", "damaged"), "steps: got none, expected a number of steps for the scheduler of"),
    (("--scheduler", "damaged", "--steps", "3"), "scheduler_config.json is no scheduler's config (KeyError"),
    (("--scheduler", "other", "--steps", "3"), "scheduler_config.json is for a MyScheduler, which is no scheduler of"),
]
HOSTILE = [
    ({"_class_name": "UNet2DModel"}, "is for a UNet2DModel, which is no scheduler of diffusers"),
    ({"_class_name": "ConfigMixin"}, "is for a ConfigMixin, which is no"),
    ({"_class_name": "VQDiffusionScheduler", "num_vec_classes": 9}, "makes no VQDiffusionScheduler that has a table"),
    ({"num_train_timesteps": -1}, "has num_train_timesteps -1, expected a whole number from 1 to 1000000"),
    ({"steps_offset": 10**9}, "has steps_offset 1000000000, expected at most 1000000"),
    ({"beta_schedule": "unknown"}, "makes no DDIMScheduler that has a table (NotImplementedError: unknown is"),
    ({"trained_betas": [0.1, 2, 3]}, "has trained_betas that are not numbers in (0, 1]"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1e308}, "makes no FlowMatchEulerDiscreteScheduler"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name, config in (("damaged", {"steps": 3}), ("other", {"_class_name": "MyScheduler"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scheduler_config.json").write_text(json.dumps(config))
    check_refused(capsys, message, "table", *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"damaged", "other"}


@pytest.mark.parametrize("config, message", HOSTILE)
def test_a_config_of_a_stranger_makes_a_scheduler_or_one_line(tmp_path, monkeypatch, capsys, config, message):
    mixin = pytest.importorskip("diffusers").ModelMixin
    monkeypatch.setattr(mixin, "__init__", lambda *_, **__: pytest.fail("a model was made"))
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"} | config))
    check_refused(capsys, message, "table", "--scheduler", tmp_path, "--steps", 5)
