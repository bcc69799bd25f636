"""`ddpm-ext`: help, info, messages for wrong input, and interruption."""

import functools
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.command_line import ENVIRONMENT, call, check_refused, in_forks
from support.forks import said

import ddpm_ext
from ddpm_ext import GaussianDiffusion, cli, version
from ddpm_ext.cli import sample
from ddpm_ext.ops import cards
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.training import TrainOptions

SAMPLE = ("sample", "--num", 3, "--batch-size", 1, "--steps", 2)
FULL = {"info": False, "sample --help": True}  # whether Python writes at once
GONE = {"stdout": (1,), "stderr": (2,), "stdout and stderr": (1, 2)}


@pytest.fixture(scope="module")
def ended(tiny, tmp_path_factory):
    """The folders and the exit codes of commands as processes."""
    folder, full = tmp_path_factory.mktemp("commands"), {"full": (1,)}
    runs = {f"full, {name}": full | {"arguments": name.split(), "unbuffered": FULL[name]} for name in FULL}
    for name, streams in GONE.items():
        out = ("--graph", "--out", folder / f"gone, {name}" / "a.npz")  # --graph: a warning, on a CPU
        runs[f"gone, {name}"] = {"arguments": [*SAMPLE, "--model", tiny, *out], "gone": streams, "unbuffered": True}
    runs["info"] = {"arguments": ["info"]}
    runs["warning"] = {"arguments": [*SAMPLE, "--model", tiny, "--quiet", "--graph", "--out", folder / "a.npz"]}
    codes = in_forks(folder, {name: [one] for name, one in runs.items()})
    return {name: (folder / name, codes[name][0]) for name in runs}


def test_info(ended, monkeypatch):
    folder, code = ended["info"]
    assert (code, said(folder, 0)) == (0, "")
    assert {"torch", "cuda", "devices", "cpu", "threads"} <= set(re.findall(r"\w+", said(folder, 0, "out")))
    monkeypatch.setattr(sys, "stdout", None)  # one that is closed
    assert call("info") == 0
    monkeypatch.setattr(sample, "run", lambda options: sys.exit(143))  # as training ends after a SIGTERM
    assert cli.main(["sample"]) == 143


def test_info_says_why_there_is_no_gpu(monkeypatch, capsys):
    def init(*refused):
        if refused:
            raise RuntimeError("No CUDA GPUs are available. Look\nfor one")

    def told(cuda, init):
        monkeypatch.setattr(version, "C", SimpleNamespace(build_info=lambda: {"cuda": cuda}))
        monkeypatch.setattr(torch.cuda, "init", init)
        assert call("info") == 0
        return [line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines() if line.startswith("no gpu")]

    monkeypatch.setattr(version, "BUILT", {"why_cpu": "nvcc is not found"})
    monkeypatch.setattr(torch.cuda, "current_device", int)
    assert told(None, init) == ["ddpm_ext is built without CUDA: nvcc is not found"]
    assert told("13.0", lambda: init(1)) == [f"torch {torch.__version__} can use no GPU: No CUDA GPUs are available"]
    monkeypatch.setattr(version, "lacks_code_for", lambda index: f"card {index} is too new")
    assert told("13.0", init) == ["card 0 is too new"]
    monkeypatch.setattr(version, "lacks_code_for", lambda index: "")
    assert told("13.0", init) == []


@pytest.mark.parametrize("command", FULL)
def test_stdout_on_a_full_disk(ended, command):
    """Printing fails, or the flush at the end; argparse says nothing of either."""
    folder, code = ended[f"full, {command}"]
    assert code == 2
    assert re.fullmatch("ddpm-ext.*: the output cannot be written: No space left on device\n", said(folder, 0))


@pytest.mark.parametrize("gone", GONE)
def test_work_goes_on_when_nobody_reads(ended, gone):
    """Who reads the lines or a warning goes away, as `head` does: the file is written, and the code is 1."""
    folder, code = ended[f"gone, {gone}"]
    texts = {name: said(folder, 0, name[3:]) for name in ("stdout", "stderr")}
    assert code == 1 and all(bool(text) == (name not in gone) for name, text in texts.items())
    assert not any(word in texts["stderr"] for word in ("Traceback", "Exception", "rror"))
    assert "stdout" in gone or "a.npz: 3 samples" in texts["stdout"]
    with np.load(folder / "a.npz") as opened:
        assert len(opened["arr_0"]) == 3


def test_samplers_are_listed_in_their_groups(capsys):
    """Each once, in one line; help texts point there."""
    assert call("samplers") == 0
    *groups, _, spacings = capsys.readouterr().out.split("\n\n")
    lines = {group.partition(":")[0]: group.splitlines()[1:] for group in groups}
    names = {line.split()[0]: (group, line) for group, within in lines.items() for line in within}
    assert sorted(names) == sorted(SAMPLERS) and sum(map(len, lines.values())) == len(SAMPLERS)
    assert all(name in spacings for name in SPACINGS)
    assert [names[name][0] for name in ("unipc", "plms", "heun", "sa_solver", "edm", "euler_cfg_pp")] == [
        "without noise, one call of the model a step",
        "without noise, one call of the model a step",
        "without noise, two calls a step",
        "with noise, one call of the model a step",
        "with noise, two calls a step",
        "for guidance",
    ]
    assert "  eta  DDIM: " in names["ddim"][1] and "eta" not in names["unipc"][1]
    for command in ("sample", "table"):
        assert call(command, "--help") == 0
        page = " ".join(capsys.readouterr().out.split())
        assert page.count("a name that ddpm-ext samplers lists") >= 2 and "euler_cfg_pp" not in page


def test_help_shows_groups_and_defaults(capsys):
    commands = ("sample", "invert", "train", "bits-per-dim", "trajectory", "table", "samplers", "plot", "info")
    kinds = ("schedules", "table", "grid", "losses", "histogram", "guidance")
    pages = {}
    for name in ("", *commands, *(f"plot {kind}" for kind in kinds)):
        assert call(*name.split(), "--help") == 0
        pages[name], errors = capsys.readouterr()
        assert errors == "" and pages[name].startswith(f"usage: ddpm-ext {name}".rstrip())
    assert all(word in pages[""] for word in commands) and all(word in pages["plot"] for word in kinds)
    for word in ("how to sample:", "(default: 64)", "guided-diffusion", "examples:", "torchrun", "--spacing"):
        assert word in pages["sample"]
    for command, page in (((), ""), (("help",), ""), (("help", "plot", "grid"), "plot grid")):
        assert call(*command) == 0 and capsys.readouterr().out == pages[page]
    pages["--version"] = f"ddpm-ext {version.__version__}\n"
    for option, page in (("--help", ""), ("--version", "--version")):  # as installed: without importing torch
        code = "import sys, ddpm_ext_command as c; c.main(); sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code, option], env=ENVIRONMENT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, pages[page])


BAD = [
    (("sample", "--num", "0"), "--num: got 0, expected a whole number from 1 to 1000000000"),
    (("sample", "--steps", "1001"), "steps is 1001, expected 1 to 1000, the schedule's timesteps"),
    (("sample", "--spacing", "karras", "--steps", "2000000000"), "--steps: got 2000000000, expected a whole"),
    (("sample", "--guidance", "2"), "but digits has no classes, expected a class-conditional model, such as shapes"),
    (("sample", "--num-images", "4", "--npz", "a.npy"), "npz: got a.npy, expected a name that ends in .npz"),
    (("sample", "--npz"), "npz: belongs to --num-images"),
    (("sample", "--eta", "1"), "eta: got 1.0, but it belongs to ddim"),
    (("sample", "--device", "abacus"), "device: abacus can't be used here"),
    (("sample", "--device", "meta"), "device: got meta, expected cpu, or cuda"),
    (("train", "--out", "run", "--device", "cpu:5"), "device: got cpu:5, expected cpu, or cuda"),
    (("sample", "--step", "5"), "sample: unrecognized arguments: --step, expected an option such as '--steps', "),
    (("train", "--ot", "a", "--steps", "0"), "train: unrecognized arguments: --ot, expected an option such as '--ou"),
    (("sample", "--out", ""), "--out: got an empty text"),
    (("train", "--out", "run", "--wandb", ""), "--wandb: got an empty text"),
    (("sample", "--out", "no/such/a.npz"), "out: cannot write no/such/a.npz: there is no folder "),
    (("sample", "--num-images", "4", "--quiet", "--out", "no/such"), "there is no folder "),
    (("train", "--out", "no/such"), "there is no folder "),
    (("train", "--steps", "1"), "required: --out"),
    (("train", "--out", "run", "--widths", "a,b"), "--widths: got a,b"),
    (("train", "--out", "run", "--data", ".", "--image-size", "8"), "data: no images in ., expected files ending in"),
    (("bits-per-dim", "nowhere"), "data: got nowhere, expected a file or a folder that exists"),
    (("bits-per-dim", "shapes"), "data: shapes are 3x8x8, expected 1x8x8, as digits has"),
    (("invert", "a.npz", "--spacing", "leading", "--steps", 1), "steps is 1 with spacing 'leading', which begins at"),
    (("tain",), "invalid choice: 'tain', expected one such as 'train', "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_refused(capsys, message, *arguments)
    assert not list(tmp_path.iterdir())


def test_long_arguments_and_pipes_are_one_short_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    for option in ("--start", "--mask", "--noise"):
        more = ("--inpaint", "pipe.png") if option == "--mask" else ()
        check_refused(capsys, "is no regular file", "sample", option, "pipe.png", *more, "--steps", 2)
    for option in ("model", "sampler", "spacing", "out", "device", "table", "start", "steps", "backend", "no"):
        assert call("sample", f"--{option}", "x " * 2500 if option == "sampler" else "x" * 5000) == 2, option
        written = capsys.readouterr().err
        assert written.count("\n") == 1 and len(written) < 2500, option
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.png"]


def test_out_is_checked_before_the_work(tiny, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    for out in ("file/a.npz", "folder.npz"):
        assert call("sample", "--model", tiny, "--num", 1, "--out", tmp_path / out) == 2
    assert call("train", "--steps", 1, "--out", tmp_path / "file") == 2
    written = capsys.readouterr()
    assert (written.err.count("\n"), written.err.count(": out: ")) == (3, 3)
    assert (tmp_path / "file").read_bytes() == b""


def test_missing_extra_names_the_command(tiny, tmp_path, monkeypatch, capsys):
    """Also where diffusers is there, but not what it imports: the same pip command installs that."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("import no_such_package.inner\n")
    command = ("sample", "--model", tiny, "--num", 1, "--out", tmp_path / "a.npz")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        check_refused(capsys, "needs diffusers: pip install diffusers, or ", *command)
        patch.delitem(sys.modules, "diffusers")
        patch.syspath_prepend(tmp_path)
        message = "needs diffusers, which needs no_such_package, which is not installed: pip install diffusers, or"
        check_refused(capsys, message, *command)


def test_a_warning_is_one_line(ended):
    folder, code = ended["warning"]
    message = r"ddpm-ext sample: graph: steps are not captured in a CUDA graph \(the samples are on cpu.*\n"
    assert code == 0 and re.fullmatch(message, said(folder, 0))


@pytest.mark.parametrize(
    "archs, card, runs",
    [("8.0 9.0+PTX", None, False), ("8.0 9.0", (8, 9), True), ("8.6 9.0+PTX", (8, 0), False), ("Hopper", (9, 0), True)]
    + [(f"8.0 9.0{kind}", (10, 0), kind == "+PTX") for kind in ("", "+PTX", "a", "a+PTX")],
)
@pytest.mark.filterwarnings("ignore:device is cpu, since Card 1 has")
def test_default_device_is_a_gpu_that_this_build_can_use(monkeypatch, archs, card, runs):
    """And what is asked for on another one says which command makes the code for it."""
    taken = []
    monkeypatch.setattr(sample, "run", lambda options: taken.append(options.device))
    says = {"is_available": bool(card), "get_device_name": "Card 1", "current_device": 0, "get_device_capability": card}
    for name, value in says.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(cards, "lacks_code_for", lacks := functools.cache(cards.lacks_code_for.__wrapped__))
    monkeypatch.setattr(version, "lacks_code_for", lacks)
    monkeypatch.setattr(cards, "BUILT", {"archs": archs})
    for cuda in (None, "13.0"):
        monkeypatch.setattr(version, "C", SimpleNamespace(build_info=lambda cuda=cuda: {"cuda": cuda}))
        assert cli.main(["sample"]) == 0 and cli.main(["sample", "--device", "cpu"]) == 0
        assert TrainOptions().device == taken[-2]
    assert taken == ["cpu", "cpu", "cuda" if runs else "cpu", "cpu"]
    if card is not None and not runs:
        gpu, own = torch.device("cuda", 0), "{}.{}".format(*card)
        says = (
            f"device is cuda:0, expected .* capability {own}, and ddpm_ext was compiled for {re.escape(archs)}; run: "
        )
        for call, given in ((ddpm_ext.randn, ((1, 1),)), (GaussianDiffusion(20).tables.find, ("steps",))):
            with pytest.raises(ValueError, match=f"{says}TORCH_CUDA_ARCH_LIST={own} "):
                call(*given, device=gpu, dtype=torch.float32)


def test_ctrl_c(tiny, tmp_path):
    # So many that it takes minutes: it must not be over before it is interrupted.
    command = [sys.executable, "-m", "ddpm_ext", "sample", "--num", "2000", "--out", str(tmp_path / "a.npz")]
    command += ["--device", "cpu", "--graph"]
    # A shell's background jobs ignore the signal, and what a process ignores its children ignore, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    seen = b""
    while b"not captured" not in seen and running.poll() is None:
        seen += os.read(running.stderr.fileno(), 4096)  # until a warning of the loop says that sampling has started
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=300)[1]
    assert running.returncode == 130 and b"ddpm-ext sample: interrupted" in rest and b"Traceback" not in rest
    assert not list(tmp_path.iterdir())
