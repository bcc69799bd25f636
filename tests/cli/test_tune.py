"""`ddpm-ext tune` and `compare`, and sampling with tables that are tuned to a model or given."""

import json
import re
import shutil

import pytest
import torch
from support.command_line import TINY, call, check_refused
from support.every_option import entries
from support.sampling_values import SAMPLING, Drawn

from ddpm_ext import GaussianDiffusion, Philox, StepTable, models
from ddpm_ext.cli.chosen_tables import choose_default, chosen_tables
from ddpm_ext.cli.main import build_parser
from ddpm_ext.cli.network import model_hash
from ddpm_ext.cli.sampling import draw, prepare
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.models.scheduler import DiffusionSettings
from ddpm_ext.models.tuned import save_tuned, table_name
from ddpm_ext.tuning import Tuner, search

STEPS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a table of two steps, and what tuning it printed, in tune.txt."""
    folder = tmp_path_factory.mktemp("model") / "mine"
    torch.manual_seed(0)
    models.save_model(models.build_unet(TINY), DiffusionSettings(timesteps=100), folder)
    with pytest.MonkeyPatch.context() as patch, open(folder / "tune.txt", "w") as out:
        patch.setattr(search, "EVALUATIONS", 4)
        patch.setattr("sys.stdout", out)
        given = ("--steps", STEPS, "--seeds", 2, "--batch-size", 1, "--seed", 7, "--plot", folder / "tune.png")
        assert call("tune", "--model", folder, *given) == 0
    return folder


def test_tune_writes_tables_and_says_what_they_reach(model):
    lines = (model / "tune.txt").read_text().splitlines()
    most, made = (int(re.search(r"([\d,]+) calls of the model", lines[i])[1].replace(",", "")) for i in (0, 3))
    assert re.fullmatch(r"about \d+ to \d+ (seconds|minutes)", lines.pop(1))
    assert 100 < made <= most and lines[1] == str(model / "tuned" / "2.json")
    table = StepTable.load(model / "tuned" / "2.json")
    calls, error, best = lines[4].split()[:3]
    assert (calls, float(error)) == ("2", pytest.approx(table.notes["error"], abs=1e-4)) and float(error) <= float(best)
    typed = re.fullmatch(r"the best name for 2 calls: (.*)", lines[5])[1].split()
    name, _, spacing = lines[4].split()[3:6]
    assert typed[:4] == ["--sampler", name, "--spacing", spacing.rstrip(",;")]
    assert build_parser().parse_args(["sample", *typed]).steps in (1, 2)
    assert "the table is this name's" in lines[4] or lines[6].startswith("2 calls: ")
    assert lines[-1] == str(model / "tune.png")
    expected = {"seed": 7, "guidance": None, "model_sha256": model_hash(models.load_model(model))}
    assert table.notes.items() >= expected.items()


def test_sample_takes_the_table_as_the_loop_does(model):
    loaded, path = models.load_model(model), model / "tuned" / "2.json"
    options = {"sampler": StepTable.load(path), "rng": Philox(3, sample_ids=1), "record": "last", "progress": False}
    expected = loaded.settings.diffusion().p_sample_loop(loaded.unet, (2, *loaded.shape), **options)
    for way in (("--sampler", "tuned", "--steps", "2"), ("--table", str(path))):
        given = ["sample", "--model", str(model), "--seed", "3", "--quiet", "--device", "cpu", *way]
        parsed = build_parser().parse_args(given)
        prepared = prepare(parsed, pictures=False)
        assert prepared.steps == 2 and torch.equal(draw(prepared, parsed, 1, 2), expected)


def test_the_default_is_the_best_table(model, tmp_path):
    stale = shutil.copytree(model, tmp_path / "stale")
    save_tuned(StepTable.load(model / "tuned" / "2.json"), stale / "tuned" / "2.json", model_sha256="another", seed=0)
    for options, sampler, steps in (
        ("", "tuned", 2),
        ("--steps 3", "dpmpp_2m", 3),
        ("--guidance 1,2", "dpmpp_2m", 20),  # of several scales each needs its table
        ("--spacing 9,3", "dpmpp_2m", None),
        ("--sampler ddpm", "ddpm", None),
        ("--inpaint a.png --mask b.png --jump-n-sample 2", "ddpm", None),
        ("--model digits", "tuned", 10),
        (f"--model {stale}", "dpmpp_2m", 20),
    ):
        parsed = build_parser().parse_args(f"plot guidance --guidance 1 --model {model} {options}".split())
        said = choose_default(parsed, models.load_model(parsed.model), 100)
        assert (parsed.sampler, parsed.steps) == (sampler, steps)
        assert said is None if "--sampler" in options else sampler.replace("tuned", "the tuned table") in said


# The options of `sample` with which a tuned table is the default, if there is one for the scale of guidance.
TUNED_FOR = {"num", "seed", "classes", "guidance", "null_class", "dtype", "autocast"}
CHOOSE_ROWS = ("model", "sampler", "table", "steps")


def test_a_table_is_no_default_for_loops_of_other_options(model, tmp_path):
    """A table is tuned for loops from noise, with the default clip and plain guidance."""
    both = shutil.copytree(model, tmp_path / "both")
    shutil.copy(both / "tuned" / "2.json", both / "tuned" / table_name(2, 2.0))
    loaded, tuned = models.load_model(both), set()
    options = [(name, entry) for name, entry in entries(SAMPLING, SAMPLING, Drawn) if name not in CHOOSE_ROWS]
    for name, entry in options:
        typed = [text for text in map(str, (*entry.beside, *entry.given)) if text not in ("--sampler", "ddpm")]
        parsed = build_parser().parse_args(["sample", "--model", str(both), *typed])
        choose_default(parsed, loaded, 100)
        tuned |= {name} if parsed.sampler == "tuned" else set()
    assert tuned == TUNED_FOR and len(options) > len(TUNED_FOR)


def test_the_table_of_a_model_without_a_clip_is_its_default(model, tmp_path):
    unclipped = shutil.copytree(model, tmp_path / "unclipped")
    path = next(unclipped.rglob("scheduler_config.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}))
    for options, sampler in (("", "tuned"), ("--no-clip", "tuned"), ("--clip -1 1", "dpmpp_2m")):
        parsed = build_parser().parse_args(f"sample --model {unclipped} --device cpu {options}".split())
        prepare(parsed, pictures=False)
        assert parsed.sampler == sampler and parsed.no_clip == ("--clip" not in options)


def test_many_images_go_on_with_the_same_rows_alone(model, tmp_path, capsys):
    given = ("sample", "--model", model, "--num-images", 2, "--quiet", "--out", tmp_path / "many")
    assert call(*given, "--sampler", "tuned", "--steps", 2) == 0
    assert call(*given, "--table", model / "tuned" / "2.json") == 0
    settings = json.loads((tmp_path / "many" / "manifest.json").read_text())["settings"]
    assert (settings["sampler"], settings["steps"], len(settings["table_sha256"])) == ("table", 2, 64)
    capsys.readouterr()
    ddim = GaussianDiffusion(100)
    make_loop_rows(ddim, LoopOptions(sampler="ddim", steps=2)).table.save(tmp_path / "ddim.json")
    check_refused(capsys, "table_sha256 is ", *given, "--table", tmp_path / "ddim.json")


def test_missing_tables_and_options_beside_them(model, tmp_path, capsys):
    sample = ("sample", "--model", model, "--out", tmp_path / "a.npz")
    guided = model / "tuned" / "4-guidance-2.5.json"
    guided.write_bytes((model / "tuned" / "2.json").read_bytes())
    there = f"{model / 'tuned'} has those for 2, 4 with guidance 2.5"
    makes = f"ddpm-ext tune --model {model} --steps 5 makes it"
    none = f"there is no tuned table for 5 calls; {there}; {makes}"
    check_refused(capsys, none, *sample, "--sampler", "tuned", "--steps", 5)
    expected = f"steps: got none with --sampler tuned, expected a tuned table's; {model} has 2, 4 with guidance 2.5; "
    check_refused(capsys, f"{expected}type --steps 2\n", *sample, "--sampler", "tuned")
    check_refused(capsys, "steps: got 2, expected none with --table", *sample, "--table", guided, "--steps", 2)
    check_refused(capsys, "eta: got 0.5", *sample, "--table", guided, "--eta", 0.5)
    check_refused(capsys, "not allowed with argument", *sample, "--table", guided, "--sampler", "ddim")
    check_refused(capsys, "table: cannot read", *sample, "--table", tmp_path / "none.json")
    assert not list(tmp_path.iterdir())


def test_who_tunes_a_model_of_classes_hears_of_guidance(pets, tmp_path, capsys, monkeypatch):
    """And who samples with guidance and has no table for it, what makes one."""
    model = shutil.copytree(pets, tmp_path / "pets")
    loaded = models.load_model(model)
    models.save_model(loaded.unet, DiffusionSettings(timesteps=100), model, classes=loaded.classes)
    command = f"ddpm-ext tune --model {model} --steps {{}} --guidance 2"
    sample = ("sample", "--model", model, "--guidance", 2, "--sampler", "tuned", "--out", tmp_path / "a.npz")
    check_refused(capsys, f"has none; {command.format('4,6,8,10')} makes some", *sample)
    check_refused(capsys, f"has none; {command.format(6)} makes it", *sample, "--steps", 6)
    with_null = f"{command.format(6)} --null-class 3 makes it"
    check_refused(capsys, with_null, *sample, "--steps", 6, "--null-class", 3)

    def stop(*_):
        raise ValueError("enough was seen")

    monkeypatch.setattr(Tuner, "tune", stop)
    for given, told in (((), True), (("--guidance", 1), False), (("--guidance", 2), False)):
        assert call("tune", "--model", model, "--steps", "3,2", *given) == 2
        assert (command.format("2,3") in capsys.readouterr().out) is told


def test_another_model_warns_once(model, tmp_path):
    given = ("--num", 2, "--batch-size", 1, "--quiet", "--out", tmp_path / "a.npz")
    with pytest.warns(UserWarning, match="tuned to another model than digits") as warned:
        assert call("sample", "--model", "digits", "--table", model / "tuned" / "2.json", *given) == 0
    assert [str(warning.message).startswith("the table was tuned to another model") for warning in warned].count(
        True
    ) == 1


def test_each_scale_of_guidance_has_its_table(pets, tmp_path):
    model = shutil.copytree(pets, tmp_path / "pets")
    loaded, made = models.load_model(model), {}
    for scale, sampler in ((1.0, "ddim"), (2.0, "euler")):
        made[scale] = make_loop_rows(loaded.settings.diffusion(), LoopOptions(sampler=sampler, steps=3)).table
        made[scale].save(model / "tuned" / table_name(3, scale))
    given = ("plot", "guidance", "--model", str(model), "--guidance", "1,2", "--sampler", "tuned", "--steps", "3")
    found = chosen_tables(build_parser().parse_args(given), loaded)
    assert found == made and found[1.0] != found[2.0]


def test_compare_shows_the_best_and_where_the_others_are(model, tmp_path, capsys):
    given = ("--calls", "1", "--seeds", 1, "--quiet", "--plot", tmp_path / "compare.png")
    assert call("compare", "--model", model, *given) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split() for line in lines if " with " in line]
    errors = [float(line[-1].rstrip("*")) for line in shown]
    assert 1 < len(shown) <= 10 and errors == sorted(errors) and shown[0][-1].endswith("*")
    assert lines[-1] == str(tmp_path / "compare.png") and (tmp_path / "compare.png").is_file()


def test_wrong_input_is_found_before_the_model_runs(model, tiny, tmp_path, capsys):
    for command, counts in (("tune", "steps"), ("compare", "calls")):
        refuse = lambda message, *given: check_refused(capsys, message, command, "--model", *given)  # noqa: B023, E731
        refuse(f"{counts}: got 0,4, expected numbers from 1 to 100", model, f"--{counts}", "0,4")
        refuse("has 20 timesteps, expected at least 100", tiny)
        refuse("plot: got a.txt", model, "--plot", "a.txt")
        refuse("guidance: got 2.5, but", model, "--guidance", 2.5)
    (tmp_path / "file").write_bytes(b"")
    check_refused(capsys, "out: cannot write", "tune", "--model", model, "--out", tmp_path / "file")
