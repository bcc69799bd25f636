"""Every option of the other commands changes what they write, and the best name's printed options draw its loop."""

import json

import numpy as np
import pytest
import torch
from support.command_line import call
from support.every_option import Another, Elsewhere, Refused, Same, check_has_value, entries, keywords_of, options_of
from support.sampling_values import SAMPLING, write_inputs

from ddpm_ext import GaussianDiffusion
from ddpm_ext.cli import compare
from ddpm_ext.cli.main import build_parser
from ddpm_ext.cli.overview import COMMANDS
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tuning import Tuner
from ddpm_ext.tuning.names import named_of, named_tables

# In test_every_sampling_option.py, and in tests/training/test_every_option.py and test_averages.py.
ELSEWHERE = {"sample", "train", "average"}
MODEL = {name: SAMPLING[name] for name in ("network", "device", "backend", "quiet")}
MODEL |= {"model": Another(("--model", "other")), "batch_size": Same(("--batch-size", 1), "only a size of batches")}
CLIPS = {"clip": Another(("--clip", -0.5, 0.25)), "no_clip": Another(("--no-clip",))}
CALLED = {"autocast": Another(("--autocast", "bfloat16")), "channels_last": SAMPLING["channels_last"]}
SEEDED = {"seed": Another(("--seed", 5)), "classes": Another(("--class", "hen"))}
GUIDED = {"guidance": Another(("--guidance", 2)), "null_class": Another(("--null-class", 1), ("--guidance", 2))}
TUNING = MODEL | CALLED | CLIPS | SEEDED | GUIDED | {
    "seeds": Another(("--seeds", 4)),
    "threshold": Another(("--threshold", 0.6)),
    "threshold_max": Another(("--threshold-max", 1.05), ("--threshold", 0.6)),
    "plot": Refused(("--plot", "a.txt"), "plot: got a.txt"),  # test_tune.py
}  # fmt: skip
TABLES = {
    "steps": Another(("--steps", 5)),
    "mu": Refused(("--mu", 1), "mu: got 1.0, but there is no scheduler"),  # test_table.py
    "spacing": Another(("--spacing", "karras")),
    "eta": Another(("--eta", 0.5)),
    "prediction": Another(("--prediction", "v")),
    "beta_schedule": Another(("--beta-schedule", "cosine")),
    "timesteps": Another(("--timesteps", 500)),
}
OUT = {"out": Refused(("--out", "nowhere/out"), "out: ")}
DRAWN = dict.fromkeys(SAMPLING, Elsewhere("test_every_sampling_option.py"))
# By command: its arguments, and other values of its options. A word OUT stands for a new folder.
BASES = {
    "compare": ("--model", "pets", "--calls", 1, "--seeds", 2),
    "tune": ("--model", "pets", "--steps", 1, "--seeds", 2, "--out", "OUT/tuned"),
    "invert": ("images.npz", "--model", "pets", "--steps", 3, "--out", "OUT/noise.npy"),
    "bits-per-dim": ("five.npz", "--model", "pets", "--num", 3, "--out", "OUT/bits.npz"),
    "score": ("five.npz", "--data", "five.npy", "--features", "pixels", "--out", "OUT/score.json"),
    "table": ("--sampler", "ddim", "--steps", 4, "--save", "OUT/table.json"),
    "trajectory": ("--model", "pets", "--num", 1, "--sampler", "ddim", "--steps", 4, "--out", "OUT/a.png"),
    "plot schedules": ("linear", "--out", "OUT/a.png"),
    "plot table": ("ddim", "euler", "--steps", 4, "--out", "OUT/a.png"),
    "plot grid": ("images.npz", "--out", "OUT/a.png"),
    "plot histogram": ("--model", "pets", "--num", 1, "--sampler", "ddim", "--steps", 4, "--out", "OUT/a.png"),
}
VALUES = {
    "compare": TUNING | {"calls": Another(("--calls", 2))},
    "tune": TUNING | OUT | {"steps": Another(("--steps", 2))},
    "invert": MODEL | CALLED | OUT | {
        "images": Another("folder/b.png"),
        "classes": SEEDED["classes"],
        "steps": Another(("--steps", 4)),
        "spacing": Another(("--spacing", "linspace")),
        "clip": CLIPS["clip"],
        "dtype": Another(("--dtype", "bfloat16")),
        "compile": Same(("--compile",), "by a stand-in"),
        "graph": Same(("--graph",), "the same steps"),
    },
    "bits-per-dim": MODEL | SEEDED | CLIPS | OUT | {
        "data": Another("folder/b.png"),
        "num": Another(("--num", 2)),
        "no_classes": Another(("--no-classes",)),
        "dtype": Another(("--dtype", "bfloat16")),
    },
    "score": OUT | {
        "samples": Another("five.npy"),
        "data": Another(("--data", "five.npz")),
        "features": Another(("--features", "support.sampling_values:features")),
        "device": SAMPLING["device"],
        "batch_size": MODEL["batch_size"],
        "quiet": SAMPLING["quiet"],
    },
    "table": TABLES | {
        "sampler": Another(("--sampler", "euler")),
        "scheduler": Refused(("--scheduler", "pets"), "not allowed with argument --sampler"),  # test_table.py
        "save": Refused(("--save", "a.txt"), "save: got a.txt"),
        "plot": Another(("--plot", "OUT/plot.png")),
        "diff": Another(("--diff", "euler", "--plot", "OUT/plot.png"), ("--plot", "OUT/plot.png")),
    },
    "trajectory": DRAWN | OUT | {"every": Another(("--every", 2))},
    "plot schedules": OUT | {"names": Another("cosine"), "timesteps": Another(("--timesteps", 500))},
    "plot table": TABLES | OUT | {
        "sources": Another("heun"),
        "against": Another(("--against", "timestep")),
        "panels": Another(("--panels", "tables")),
    },
    "plot grid": OUT | {
        "file": Another("noise.npy"),
        "num": Another(("--num", 2)),
        "columns": Another(("--columns", 1)),
        "scale": Another(("--scale", 2)),
    },
    "plot histogram": DRAWN | OUT | {"bins": Another(("--bins", 20)), "limit": Another(("--limit", 0.5))},
}  # fmt: skip
LISTED = [(command, *pair) for command in BASES for pair in entries(VALUES[command], options_of(*command.split()))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def first():
    """The results of the commands without the option, by their arguments."""
    return {}


SEEN = []  # what LoopOfTuner's command made: samples, seeds, numbers of calls


class LoopOfTuner:
    """Stands for the Tuner, whose options tests/tuning/test_every_option.py has: draws samples with them, and ends."""

    def __init__(self, diffusion, model, shape, *, seeds, rng, progress, **options):
        assert {"seeds", "rng", "progress", *options} <= {*keywords_of(Tuner)}
        options |= {"sampler": "ddim", "steps": 3, "record": "last", "progress": False, "rng": rng}
        with torch.no_grad():
            SEEN[:] = [diffusion.p_sample_loop(model, shape, **options).numpy(), seeds]

    def planned_calls(self, counts, fit=True):
        SEEN.append(list(counts))
        raise SystemExit(0)


@pytest.fixture(autouse=True)
def begin(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(compare, "Tuner", LoopOfTuner)
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: model)


def contents(path):
    """What a file holds, without words: they may name an option that changes nothing else."""
    if path.suffix == ".json":
        return {name: value for name, value in json.loads(path.read_text()).items() if isinstance(value, (float, list))}
    if path.suffix in (".npz", ".npy"):
        found = np.load(path)
        return [found[name] for name in found.files] if path.suffix == ".npz" else [found]
    return path.read_bytes()


def result(out, capsys, *command):
    """The contents of the files that a command wrote; of the commands that tune, SEEN."""
    out.mkdir()
    capsys.readouterr()
    code = call(*(str(word).replace("OUT/", f"{out}/") for word in command))
    written = capsys.readouterr()
    assert code == 0, written.err
    if command[0] in ("compare", "tune"):
        return list(SEEN)
    return [contents(path) for path in sorted(out.rglob("*")) if path.is_file()]


def close(one, other):
    if isinstance(one, list | dict):
        pairs = (
            zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else zip(one, other, strict=True)
        )
        return len(one) == len(other) and all(close(*pair) for pair in pairs)
    return (
        one == other if isinstance(one, str | bytes) or one is None else np.allclose(one, other, rtol=1e-3, atol=1e-3)
    )


def same(one, other):
    try:
        np.testing.assert_equal(one, other)
    except AssertionError:
        return False
    return True


def test_all_commands_with_options_are_here():
    assert {name for name in COMMANDS if options_of(name)} - ELSEWHERE == {base.split()[0] for base in BASES}


@pytest.mark.filterwarnings("ignore:.*CUDA graph")
@pytest.mark.parametrize(("command", "name", "entry"), LISTED)
def test_another_value_is_seen_in_the_result(first, tmp_path, capsys, command, name, entry):
    check_has_value(name, entry)
    base = (*command.split(), *BASES[command], *(getattr(entry, "beside", None) or ()))
    if isinstance(entry, Refused):
        assert call(*base, *entry.given) == 2 and entry.message in capsys.readouterr().err
        return
    if base not in first:
        first[base] = result(tmp_path / "first", capsys, *base)
    place = len(command.split())  # of an argument without a name
    unnamed = isinstance(entry.given, str)
    words = (*base[:place], entry.given, *base[place + 1 :]) if unnamed else (*base, *entry.given)
    found = result(tmp_path / "other", capsys, *words)
    assert close(found, first[base]) if isinstance(entry, Same) else not same(found, first[base])


@pytest.mark.parametrize("command", [name for name in BASES if "backend" in VALUES[name]])
def test_the_backend_reaches_the_diffusion(tmp_path, capsys, monkeypatch, command):
    made, real = [], GaussianDiffusion.__init__

    def note(self, *arguments, **options):
        real(self, *arguments, **options)
        made.append(self.backend)

    monkeypatch.setattr(GaussianDiffusion, "__init__", note)
    result(tmp_path / "out", capsys, *command.split(), *BASES[command], "--backend", "reference")
    assert {*made} == {"reference"}


def test_printed_options_make_the_loop_that_was_measured():
    """Also the eta of samplers that have one."""
    diffusion = GaussianDiffusion(100)
    for (sampler, spacing, steps), table in named_tables(diffusion, 3).items():
        named = named_of((sampler, spacing, steps), 3, torch.ones(4))
        parsed = build_parser().parse_args(["sample", *compare.typed(named).split()])
        options = {name: getattr(parsed, name) for name in ("sampler", "spacing", "steps", "eta")}
        assert make_loop_rows(diffusion, LoopOptions(**options)).table == table, named
