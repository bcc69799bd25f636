"""benchmarks/gpu where there is no GPU: how it runs its parts, reads their logs and writes their results."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import logs, machine, parts, speed, timing
from benchmarks.gpu.logs import COUNTERS, CUT_OFF, FAIL, NOT_MEASURED, PASS
from benchmarks.gpu.names import ADD, COMPILED, DIFFUSERS, NEAR
from benchmarks.gpu.parts import ROOT, Part
from benchmarks.gpu.report import bounds, markdown
from benchmarks.gpu.ways import CHANNELS_LAST, MOVED, STEPS, WITH_OPTIONS


def part(name, code, seconds=1000.0, read=logs.read_rows):
    return Part(name, seconds, (sys.executable, "-c", code), read)


def row(**values):
    return f"print({json.dumps(values)!r}, flush=True); "


def main(monkeypatch, *arguments):
    """The exit status of the script in this process."""
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, arguments)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        return script.main()
    except SystemExit as stopped:
        return stopped.code
    finally:
        signal.signal(signal.SIGTERM, before)


MACHINE = part("machine", row(card="Card 1"))
# With these words in its code a part's time is over, and it hangs: then and not before, however slow the machine is.
OVER = "import os, time; os.write(int(os.environ['OVER']), b'.'); time.sleep(600)"


class Process(subprocess.Popen):
    """A part's process. Its time is over when it says so by OVER, and only then."""

    def __init__(self, *arguments, env, **options):
        self.is_over = False
        self.said, say = socket.socketpair()
        with say, contextlib.ExitStack() as failed:
            failed.callback(self.said.close)
            number = say.fileno()
            super().__init__(*arguments, env=env | {"OVER": str(number)}, pass_fds=[number], **options)
            failed.pop_all()

    def __exit__(self, *error):
        self.said.close()
        super().__exit__(*error)

    def wait(self, timeout=None):
        if timeout is not None and not self.is_over:  # after it, the second wait is for the grace
            self.is_over = bool(self.said.recv(1))  # nothing where the process has ended
            if self.is_over:
                raise subprocess.TimeoutExpired(self.args, timeout)
        return super().wait(timeout)


def run(monkeypatch, folder, *chosen, grace=0.0):
    """The exit status and the results."""
    monkeypatch.setattr(script, "GRACE", grace)
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Process}))
    with contextlib.redirect_stdout(None):  # a crash on purpose is nobody's concern
        status = script.run_all(chosen, sum(p.seconds for p in chosen), folder)
    results = json.loads((folder / "card-1.json").read_text())["parts"]
    assert sorted(path.name for path in folder.iterdir()) == ["card-1.json", "card-1.log", "card-1.md"]
    assert list(results) == [p.name for p in chosen]
    return status, results


def test_a_part_that_crashes_stops_no_other(monkeypatch, tmp_path):
    """Each result is written, whole, before the next part begins. No paths of this machine are published."""
    crash = part("crash", row(n=1) + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    missing = Part("missing", 100, ("no such program",), logs.read_rows)
    raises = part("raises", f"print({str(ROOT)!r}, {sys.prefix!r}); raise SystemExit('no memory in ' + {str(ROOT)!r})")
    look = part("look", f"print(open({str(tmp_path / 'card-1.json')!r}).read().replace('\\n', ''))")
    not_installed = Part("not installed", 100, (), logs.read_rows)
    status, found = run(monkeypatch, tmp_path, MACHINE, crash, missing, raises, not_installed, look)
    assert status == 1 and [p["verdict"] for p in found.values()] == [PASS, FAIL, FAIL, FAIL, NOT_MEASURED, PASS]
    assert found["crash"]["rows"] == [{"n": 1}] and "exit status -9" in found["crash"]["found"]
    assert "no such program" in found["missing"]["found"]
    assert "exit status 1" in found["raises"]["found"] and "no memory" in found["raises"]["found"]
    (seen,) = found["look"]["rows"]
    assert list(seen["parts"]) == ["machine", "crash", "missing", "raises", "not installed"]
    assert seen["parts"]["crash"]["rows"] == [{"n": 1}]
    log = (tmp_path / "card-1.log").read_text()
    assert log.index("==== crash") < log.index("no memory") < log.index("==== look")
    for path in tmp_path.iterdir():
        assert str(ROOT) not in path.read_text() and sys.prefix not in path.read_text()


def test_a_part_that_takes_too_long_loses_only_its_own_time(monkeypatch, tmp_path):
    child = "import subprocess; p = subprocess.Popen(['sleep', '600']); print('child', p.pid, flush=True); "
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    slow = part("slow", row(n=1) + child + "print('{\"n\": ', end='', flush=True); " + deaf + OVER)
    status, found = run(monkeypatch, tmp_path, MACHINE, slow, part("last", row(n=2)))
    assert status == 0 and (found["slow"]["verdict"], found["slow"]["rows"]) == (CUT_OFF, [{"n": 1}])
    assert found["last"]["verdict"] == PASS
    pid = int((tmp_path / "card-1.log").read_text().partition("child ")[2].split()[0])
    while alive(pid):  # it sleeps for ten minutes, and the system may take its time to end it
        time.sleep(0.01)


def alive(pid):
    """A process that is not only waiting to be collected by its parent."""
    state = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(FileNotFoundError):
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_part_is_asked_before_it_is_ended(monkeypatch, tmp_path):
    """Also by a script in the background, which ignores SIGINT."""
    polite = f"try: {OVER}\nexcept KeyboardInterrupt: print('how it failed')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, found = run(monkeypatch, tmp_path, MACHINE, part("slow", polite), grace=600.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found["slow"]["verdict"] == CUT_OFF and "how it failed" in (tmp_path / "card-1.log").read_text()


def test_time_that_is_left_goes_to_the_next_parts(monkeypatch, tmp_path, capsys):
    """A build takes what the machine needs, and its time is none of theirs."""
    clock, given = SimpleNamespace(now=7.0), []

    def result_of(part, seconds, log):
        given.append(seconds)
        clock.now += 700.0 if part.name == "build" else 0.5
        return logs.Result(PASS, "")

    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(script, "result_of", result_of)
    chosen = parts.all_parts(dry=False)
    timed = [part for part in chosen if part.name != "build"]
    budget = sum(part.seconds for part in timed)
    named = [argument for part in chosen for argument in part.command if argument.startswith("tests/")]
    assert [argument for argument in named if not (ROOT / argument).is_file()] == []
    suite = parts.suite()
    assert len(suite) == len(set(suite)) > 20
    assert "graphs" in suite[0] and any(word in suite[-1] for word in parts.LATE)
    script.run_all(chosen, budget, tmp_path)
    assert budget <= 420 and re.search(rf"build, about \d+ s on {os.cpu_count()} cores, ...", capsys.readouterr().out)
    del given[[part.name for part in chosen].index("build")]
    shares = [sum(part.seconds for part in timed[: i + 1]) for i in range(len(timed))]
    assert given == pytest.approx([share - 0.5 * i for i, share in enumerate(shares)])
    monkeypatch.undo()
    found = script.result_of(part("late", row(n=1)), script.LEAST - 1, tmp_path / "log")
    assert found[:2] == (NOT_MEASURED, "no time was left") and not (tmp_path / "log").exists()


def test_what_cannot_be_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for arguments, message in (
        (["--dry"], "--dry needs --out"),
        (["--only", "x"], "--only has 'x'"),
        (["--out", tmp_path], "finds no GPU|is built without CUDA"),
    ):
        assert main(monkeypatch, *arguments) == 2
        said = capsys.readouterr().err
        assert re.search(message, said) and "Traceback" not in said and not list(tmp_path.iterdir())


AMPLE = "--budget=100000"  # seconds: so that a busy machine cuts no part off


def test_a_dry_run(monkeypatch, tmp_path):
    """To its end; and interrupted, by a machine that ends it, say: the results so far stay."""
    assert main(monkeypatch, "--dry", "--out", tmp_path, "--only", "speed-loop", AMPLE) == 0
    found = json.loads((tmp_path / "none-dry-run.json").read_text())["parts"]
    assert {name: p["verdict"] for name, p in found.items()} == dict.fromkeys(["machine", "speed-loop"], PASS)
    ways = {row["way"] for row in found["speed-loop"]["rows"]}
    assert ways == {f"ddpm_ext, {graph} graph" for graph in ("no", "step", "loop")}
    result_of = script.result_of

    def interrupted(part, *arguments):
        if part.name != "machine":
            signal.raise_signal(signal.SIGTERM)
        return result_of(part, *arguments)

    monkeypatch.setattr(script, "result_of", interrupted)
    assert main(monkeypatch, "--dry", "--out", tmp_path, "--only", "speed-loop", AMPLE) == 130
    assert list(json.loads((tmp_path / "none-dry-run.json").read_text())["parts"]) == ["machine"]


@pytest.mark.filterwarnings("ignore:graph. steps are not captured")
def test_every_operation_and_way_is_timed():
    bench = speed.Bench(dry=True)
    rows = [speed.attempt(job) for group in speed.GROUPS.values() for job in group(bench)]
    assert not [row for row in rows if "error" in row]
    ways = {name: {row["way"] for row in rows if row["operation"] == name} for name in {r["operation"] for r in rows}}
    assert set(ways) == {*MOVED, "a step of a loop", "empty launch"}
    ours = {way.way for way in (*STEPS, *CHANNELS_LAST)}
    assert ours | {"eager", NEAR, COMPILED, DIFFUSERS} == ways["p_sample"]
    assert {"ddpm_ext", "eager", "torch.compile of eager"} <= ways["train_losses"]
    assert {"ddpm_ext", "torch.randn"} <= ways["randn"]
    of_float32 = [row for row in rows if row["shape"] == [2, 3, 64, 64] and row["dtype"] == "float32"]
    bytes_of = {row["operation"]: row["moved_bytes"] // (2 * 3 * 64 * 64) for row in of_float32}
    step = "step_with_options"
    assert (bytes_of["p_sample"], bytes_of[f"{step}, unipc"], bytes_of[f"{step}, plms"]) == (12, 24, 28)
    assert (bytes_of[f"{step}, guidance"], bytes_of["x_start_scale"], bytes_of["output_scale"]) == (16, 8, 8)
    off_alignment = {row["operation"] for row in rows if row["shape"] == [2, 3, 63, 63]}
    assert off_alignment == {"p_sample", f"{step}, unipc", *WITH_OPTIONS}
    for row in rows:
        for found in (row[name] for name in ("cold", "warm", "call") if name in row):
            assert 0 <= found["us_low"] <= found["us"] <= found["us_high"]
    rows[0]["warm"] |= {"mhz": 1410, "limits": "power cap"}
    text = markdown({"speed-all": {"verdict": PASS, "seconds": 1.0, "found": "", "rows": rows}})
    assert all(f"| {operation} |" in text for operation in ways) and " | 1410, power cap |" in text


def test_a_row_that_fails_loses_no_other(monkeypatch):
    """All that succeed in a row share a process."""

    def fails():
        raise ValueError("too large\nand more")

    monkeypatch.setattr(speed, "MOST_SECONDS", 1000)
    works, crashes = lambda: {"n": os.getpid()}, lambda: os.kill(os.getpid(), signal.SIGKILL)
    first, failed, second, crashed, *third = speed.apart([works, fails, works, crashes, works, works])
    assert (failed, crashed) == ({"error": "ValueError: too large"}, {"error": "exit status -9"})
    assert third[0] == third[1] and len({row["n"] for row in (first, second, *third)}) == 3
    monkeypatch.setattr(speed, "MOST_SECONDS", 1)
    assert [*speed.apart([lambda: time.sleep(600)])] == [{"error": "it took longer than 1 s"}]


def test_nothing_is_on_a_card_before_a_row_is_measured(monkeypatch):
    """A process that has used CUDA cannot be forked."""

    def refuse():
        raise AssertionError("CUDA is used")

    for name in ("_lazy_init", "is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    bench = speed.Bench(dry=False)
    assert len([job for group in speed.GROUPS.values() for job in group(bench)]) > 100
    assert "CUDA is used" in speed.attempt(next(speed.steps(bench)))["error"]


def test_a_measurement_behind_an_idle_time_waits_for_the_clocks(monkeypatch):
    """An idle card has low ones. Nothing is waited for right behind another measurement."""
    now = itertools.count(step=timing.IDLE / 100)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    timer, calls = timing.Timer(torch.device("cpu"), timing.Scale(times=3, warm_up=timing.IDLE / 2)), [0]
    for idle in (0, 0, 101):
        [next(now) for _ in range(idle)]
        calls.append(0)
        timer.each(lambda: calls.append(calls.pop() + 1))
    assert calls[1] == calls[3] >= 45 + 4 and calls[2] == 4 and timing.Scale().warm_up > 0


def test_the_clock_is_measured_right_behind_the_work(monkeypatch):
    """A faked card of 1500 MHz, which is known by its identity, and at work when it is asked what limits it."""
    ms, said = [0.0], []

    class Event(SimpleNamespace):
        def record(self):
            self.ms = ms[0]

        def elapsed_time(self, later):
            return later.ms - self.ms

    def work(cycles):
        ms[0] += cycles / 1.5e6

    def reasons(_, bits):
        said.append("limits")
        bits._obj.value = 0x25

    library = SimpleNamespace(nvmlInit_v2=int, nvmlDeviceGetHandleByUUID=lambda card, _: said.append(card))
    library.nvmlDeviceGetCurrentClocksThrottleReasons = reasons
    fakes = {"Event": Event, "_sleep": work, "synchronize": lambda _: said.append("idle"), "current_device": int}
    for name, fake in (fakes | {"get_device_properties": lambda _: SimpleNamespace(uuid="12-34")}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: library)
    monkeypatch.setattr(machine, "_nvml", machine._nvml.__wrapped__)
    timer = timing.Timer(torch.device("cpu"), timing.Scale(times=2, warm_up=0))
    timer.on_gpu = True
    assert timer.each(lambda: work(3e6)) == [0.002, 0.002] and said == [b"GPU-12-34", "limits", "idle"]
    assert timer.clock == {"mhz": 1500, "limits": "power cap, software thermal"}
    monkeypatch.setattr(machine, "output", lambda *command: ", ".join(command))
    assert machine.asked("pstate")[:3] == ["nvidia-smi", "-i", "GPU-12-34"]


CALLS = "".join(json.dumps({"operation": name, "dtype": "float32"}) + "\n" for name in ("p_sample", "randn"))
LINES = [("ID", "Kernel Name", *COUNTERS.values()), ("", "", *["unit"] * len(COUNTERS))]
LINES += [(str(i), f"void ddpm_ext::f{i}<a, b>(c)", *map(str, range(10 * i, 10 * i + len(COUNTERS)))) for i in (0, 1)]
KERNELS = "==PROF== Disconnected\n" + "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in LINES)
PASSED = "tests/a.py::test_a[cuda-x y] PASSED [ 50%]\n"
SKIPPED = "tests/a.py::test_b SKIPPED (needs two GPUs) [ 75%]\n"
FAILED = "tests/a.py::test_c FAILED [100%]\n"
NO_ERRORS, ERRORS = (f"========= ERROR SUMMARY: {count} errors\n" for count in (0, 3))
WHOLE = {
    logs.read_rows: CALLS,
    logs.read_pytest: PASSED + SKIPPED,
    logs.read_sanitizer: "========= COMPUTE-SANITIZER\n" + PASSED + NO_ERRORS,
    logs.read_counters: CALLS + KERNELS,
}


def test_a_log_may_end_anywhere():
    for read, whole in WHOLE.items():
        assert all(read(whole[:end], None).verdict == CUT_OFF for end in range(len(whole) + 1))
        assert read(whole, 0).verdict == PASS


def test_counters_belong_to_their_calls():
    first, second = logs.read_counters(CALLS + KERNELS, 0).rows
    assert (first["operation"], first["ns"], second["operation"], second["ns"]) == ("p_sample", "0", "randn", "10")
    text = markdown({"counters": {"verdict": PASS, "seconds": 1.0, "found": "", "rows": [first, second]}})
    assert "| randn | float32 | 10 | 11 | 12 | 13 | 14 | 15 |" in text
    refused = logs.read_counters(CALLS + "==ERROR== ERR_NVGPUCTRPERM\n", 1)
    assert refused.verdict == NOT_MEASURED and "ERR_NVGPUCTRPERM" in refused.found


def step_row(way, us, of_copy=0.5, key="cold"):
    about = {"operation": "p_sample", "way": way, "shape": [1, 3, 32, 32], "dtype": "float32"}
    return about | {key: {"us": us, "of_copy": of_copy}, "call": {"us": 9.0}}


@pytest.mark.parametrize("key", ["cold", "warm"])
@pytest.mark.parametrize(
    "us, of_copy, found",
    [(2.0, 0.5, "a launch"), (2.4, 0.5, "neither"), (2.4, 0.9, "its bytes"), (2.0, 0.9, "its bytes")],
)
def test_what_follows_from_the_times_of_others(us, of_copy, found, key):
    """By the warm ones, where the cache holds what is moved."""
    empty = {"operation": "empty launch", "way": "", "shape": [], "dtype": "", "warm": {"us": 1.0}, "call": {"us": 4.5}}
    own = {"cold": step_row("", 100.0)["cold"]} | step_row(STEPS[0].way, us, of_copy, key)
    rows = [empty, own, step_row(ADD, 2.0, key=key), step_row(NEAR, 12.0, key="none of ours")]
    ((shape, dtype, of_empty, of_add, copy, eager, compiled, _, fast),) = bounds(rows)
    assert (shape, dtype, copy, fast) == ("1x3x32x32", "float32", f"{of_copy:.2f}", found)
    assert of_empty == f"{us if key == 'warm' else 2:.2f}"  # cold: by the call
    assert (of_add, eager, compiled) == (f"{us / 2:.2f}", "1.00", "nan")  # eager: by the call, which both have


OURS, THEIRS = (
    f"========= Invalid __global__ read of size 4 bytes\n=========     at void {name}::f()\n"
    for name in ("ddpm_ext::cuda", "at::native")
)


@pytest.mark.parametrize(
    "read, log, status, verdict, found",
    [
        (logs.read_pytest, PASSED + SKIPPED, 0, PASS, "1 passed, 1 skipped"),
        (logs.read_pytest, PASSED + FAILED, 1, FAIL, "first: tests/a.py::test_c"),
        (logs.read_pytest, PASSED + "Fatal Python error: Segmentation fault", -11, FAIL, "exit status -11, 1 passed"),
        (logs.read_pytest, SKIPPED, 0, NOT_MEASURED, "1 skipped"),
        (logs.read_pytest, "ERROR: but torch finds no GPU", 4, FAIL, "torch finds no GPU"),
        (logs.read_sanitizer, OURS + PASSED + ERRORS, 9, FAIL, ""),
        (logs.read_sanitizer, THEIRS + PASSED + ERRORS, 9, NOT_MEASURED, ""),
        (logs.read_sanitizer, "========= Error: Device not supported\n" + NO_ERRORS, 1, NOT_MEASURED, ""),
        (logs.read_sanitizer, FAILED + NO_ERRORS, 1, FAIL, ""),
    ],
)
def test_what_a_log_says(read, log, status, verdict, found):
    result = read(log, status)
    assert result.verdict == verdict and found in result.found


def bare_clone(folder):
    """What `make gpu` needs before anything is built, and a function that runs it there without a card."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if name.startswith(("benchmarks/gpu", "benchmarks/__init__", "ddpm_ext/")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    script = "import runpy, sys; sys.argv = ['gpu']; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}

    def run(before=""):
        command = [sys.executable, "-c", before + script]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    return run


WITHOUT_PACKAGES = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; "


def test_a_bare_clone_says_what_it_needs(tmp_path):
    """Before anything is built, and where there is no card, or no package. No part's process ends in a traceback."""
    run = bare_clone(tmp_path)
    found, lacks = run(), run(WITHOUT_PACKAGES)
    assert found.returncode == lacks.returncode == 2 and "finds no GPU" in found.stderr
    names = " ".join(script.NEEDED)  # all at once, for the Python that lacks them
    assert f"run: {sys.executable} -m pip install {names}\n" in lacks.stderr


@pytest.mark.parametrize("cuda, taken", [("'13.0'", True), ("None", False)])
def test_the_torch_of_venv_is_taken_where_it_is_built_with_cuda(tmp_path, cuda, taken):
    """That is what `make demo` leaves."""
    run = bare_clone(tmp_path)
    python, torch_there = tmp_path / ".venv" / "bin" / "python", tmp_path / "torch" / "__init__.py"
    for path in (python, torch_there):
        path.parent.mkdir(parents=True)
    torch_there.with_name("version.py").write_text(f"cuda: Optional[str] = {cuda}\nhip = 'x'\n")
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {torch_there} || echo taken: "$@"\n')
    python.chmod(0o755)
    assert ("taken: -m benchmarks.gpu" in run(WITHOUT_PACKAGES).stdout) is taken
