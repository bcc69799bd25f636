"""benchmarks/gpu where there is no GPU: how it runs its parts, reads their logs and writes their results."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
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
from benchmarks.gpu import build, logs, parts, speed, timing
from benchmarks.gpu.logs import COUNTERS, CUT_OFF, FAIL, NOT_MEASURED, PASS
from benchmarks.gpu.parts import ROOT, Part
from benchmarks.gpu.report import bounds, markdown
from benchmarks.gpu.ways import ADD, MOVED, NEAR, REST, STEPS, WITH_OPTIONS

WITHOUT_PYTEST = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


def part(name, code, seconds=1000.0, read=logs.read_rows):
    return Part(name, seconds, (sys.executable, "-c", code), read)


def row(**values):
    return f"print({json.dumps(values)!r}, flush=True); "


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
    status = script.run_all(chosen, sum(p.seconds for p in chosen), folder)
    results = json.loads((folder / "card-1.json").read_text())["parts"]
    assert sorted(path.name for path in folder.iterdir()) == ["card-1.json", "card-1.log", "card-1.md"]
    assert list(results) == [p.name for p in chosen]
    return status, results


def command(*arguments, **environment):
    arguments = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(arguments, cwd=ROOT, env=WITHOUT_PYTEST | environment, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------- one part after another


def test_a_part_that_crashes_stops_no_other(monkeypatch, tmp_path):
    crash = part("crash", row(n=1) + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    missing = Part("missing", 100, ("no such program",), logs.read_rows)
    raises = part("raises", "raise SystemExit('no memory')")
    not_installed = Part("not installed", 100, (), logs.read_rows)
    chosen = (MACHINE, crash, missing, raises, not_installed, part("last", row(n=2)))
    status, found = run(monkeypatch, tmp_path, *chosen)
    assert status == 1
    assert [p["verdict"] for p in found.values()] == [PASS, FAIL, FAIL, FAIL, NOT_MEASURED, PASS]
    assert found["crash"]["rows"] == [{"n": 1}] and "exit status -11" in found["crash"]["found"]
    assert "no such program" in found["missing"]["found"]
    assert "exit status 1" in found["raises"]["found"] and "no memory" in found["raises"]["found"]
    assert found["last"]["rows"] == [{"n": 2}]
    log = (tmp_path / "card-1.log").read_text()
    assert log.index("==== crash") < log.index("no memory") < log.index("==== last")


def test_a_part_that_takes_too_long_loses_only_its_own_time(monkeypatch, tmp_path):
    """And what it started ends with it, even if it does not listen."""
    child = "import subprocess; p = subprocess.Popen(['sleep', '600']); print('child', p.pid, flush=True); "
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    slow = part("slow", row(n=1) + child + "print('{\"n\": ', end='', flush=True); " + deaf + OVER)
    status, found = run(monkeypatch, tmp_path, MACHINE, slow, part("last", row(n=2)))
    assert status == 0
    assert (found["slow"]["verdict"], found["slow"]["rows"]) == (CUT_OFF, [{"n": 1}])
    assert found["last"]["verdict"] == PASS
    log = (tmp_path / "card-1.log").read_text()
    pid = int(log.partition("child ")[2].split()[0])
    while alive(pid):  # it sleeps for ten minutes, and the system may take its time to end it
        time.sleep(0.01)


def alive(pid):
    """A process that is not only waiting to be collected by its parent."""
    try:
        with open(f"/proc/{pid}/stat") as line:
            return line.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ours", [signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in the background"])
def test_a_part_is_asked_before_it_is_ended(monkeypatch, tmp_path, ours):
    """So pytest still says how tests failed."""
    polite = f"try: {OVER}\nexcept KeyboardInterrupt: print('how it failed')"
    before = signal.signal(signal.SIGINT, ours)
    try:
        _, found = run(monkeypatch, tmp_path, MACHINE, part("slow", polite), grace=600.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found["slow"]["verdict"] == CUT_OFF
    assert "how it failed" in (tmp_path / "card-1.log").read_text()


def test_each_result_is_written_before_the_next_part_begins(monkeypatch, tmp_path):
    """A part reads the results of the one before; a file is whole or not there."""
    first = part("first", row(n=1))
    look = part("look", f"print(open({str(tmp_path / 'card-1.json')!r}).read().replace('\\n', ''))")
    _, found = run(monkeypatch, tmp_path, MACHINE, first, look)
    (seen,) = found["look"]["rows"]
    assert list(seen["parts"]) == ["machine", "first"]
    assert seen["parts"]["first"]["rows"] == [{"n": 1}]


def test_time_that_is_left_goes_to_the_next_parts(monkeypatch, tmp_path):
    clock, given = SimpleNamespace(now=7.0), []

    def result_of(part, seconds, log):
        given.append(seconds)
        clock.now += 0.5
        return logs.Result(PASS, "")

    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(script, "result_of", result_of)
    chosen = parts.all_parts(dry=False)
    budget = sum(part.seconds for part in chosen)
    script.run_all(chosen, budget, tmp_path)
    assert budget <= 480
    shares = [sum(part.seconds for part in chosen[: i + 1]) for i in range(len(chosen))]
    assert given == pytest.approx([share - 0.5 * i for i, share in enumerate(shares)])


def test_no_time_is_left(tmp_path):
    found = script.result_of(part("late", row(n=1)), script.LEAST - 1, tmp_path / "log")
    assert (found.verdict, found.found) == (NOT_MEASURED, "no time was left")
    assert not list(tmp_path.iterdir())


def test_no_paths_of_this_machine_are_published(monkeypatch, tmp_path):
    code = f"print({str(ROOT)!r}, {sys.prefix!r}); raise SystemExit({str(ROOT)!r})"
    run(monkeypatch, tmp_path, MACHINE, part("paths", code))
    for path in tmp_path.iterdir():
        assert str(ROOT) not in path.read_text() and sys.prefix not in path.read_text()


# ------------------------------------------------------------------------------------------------- the real parts


def test_without_a_card(tmp_path):
    """It says why, and leaves nothing."""
    done = command("--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "finds no GPU" in done.stderr or "is built without CUDA" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [(["--dry"], "--dry needs --out"), (["--only", "x"], "--only has 'x'")])
def test_arguments_that_do_not_fit(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and message in done.stderr


AMPLE = "--budget=100000"  # seconds: so that a busy machine cuts no part off


def test_interrupted(tmp_path):
    """By a machine that ends it, say: the results so far stay, and nothing runs on."""
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path), "--only", "speed-rest", AMPLE]
    with subprocess.Popen(arguments, cwd=ROOT, env=WITHOUT_PYTEST, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "speed-rest" in line:
                break
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 130
    assert list(json.loads((tmp_path / "none-dry-run.json").read_text())["parts"]) == ["machine"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_while_a_part_starts(monkeypatch, tmp_path, number):
    """The signal is not lost, and what was started ends."""
    started, before = [], signal.signal(number, signal.default_int_handler)

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            signal.raise_signal(number)
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(number)

    monkeypatch.setattr(script.subprocess, "Popen", Popen)
    try:
        with pytest.raises(KeyboardInterrupt):
            script.run(part("slow", "import time; time.sleep(600)"), 600, tmp_path / "log")
    finally:
        signal.signal(number, before)
    assert started[0].returncode == -signal.SIGKILL


def test_a_part_starts_without_functions_for_forks():
    """An interrupt that comes in one of them is lost."""
    came = []
    os.register_at_fork(before=lambda: came.append("before"), after_in_parent=lambda: came.append("after"))
    script.run(part("quick", ""), 60, Path(os.devnull))
    assert not came


def test_a_dry_run(tmp_path):
    done = command("--dry", "--out", tmp_path, "--only", "speed-loop", AMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "none-dry-run.json").read_text())["parts"]
    assert {name: p["verdict"] for name, p in found.items()} == dict.fromkeys(["machine", "speed-loop"], PASS)
    ways = {row["way"] for row in found["speed-loop"]["rows"]}
    assert {"ddpm_ext, no graph", "ddpm_ext, step graph", "ddpm_ext, loop graph"} == ways


@pytest.mark.filterwarnings("ignore:graph. steps are not captured")
def test_every_operation_and_way_is_timed():
    """On the CPU, with tiny sizes."""
    bench = speed.Bench(dry=True)
    rows = [speed.attempt(job) for group in speed.GROUPS.values() for job in group(bench)]
    assert not [row for row in rows if "error" in row]
    ways = {name: {row["way"] for row in rows if row["operation"] == name} for name in {r["operation"] for r in rows}}
    assert set(ways) == {*MOVED, "a step of a loop", "empty launch"}
    assert {"ddpm_ext, out=", "eager", "eager, tables on the device", "torch.compile of eager"} <= ways["p_sample"]
    assert {"ddpm_ext", "eager", "torch.compile of eager"} <= ways["train_losses"]
    assert {"ddpm_ext", "torch.randn"} <= ways["randn"]
    bytes_of = {
        row["operation"]: row["moved_bytes"] // (2 * 3 * 64 * 64)
        for row in rows
        if row["shape"] == [2, 3, 64, 64] and row["dtype"] == "float32"
    }
    assert (bytes_of["p_sample"], bytes_of["step, unipc"], bytes_of["step, plms"]) == (12, 24, 28)
    assert (bytes_of["step, guidance"], bytes_of["x_start_scale"], bytes_of["output_scale"]) == (16, 8, 8)
    off_alignment = {row["operation"] for row in rows if row["shape"] == [2, 3, 63, 63]}
    assert off_alignment == {"p_sample", "step, unipc", *WITH_OPTIONS}
    for row in rows:
        for found in (row[name] for name in ("cold", "warm", "call") if name in row):
            assert 0 <= found["us_low"] <= found["us"] <= found["us_high"]
    text = markdown({"speed-all": {"verdict": PASS, "seconds": 1.0, "found": "", "rows": rows}})
    assert all(f"| {operation} |" in text for operation in ways)


def test_a_row_that_fails_loses_no_other(monkeypatch):
    """Whether it raises, crashes or hangs, as a CUDA graph may."""

    def fails():
        raise ValueError("too large\nand more")

    monkeypatch.setattr(speed, "MOST_SECONDS", 1000)
    jobs = (fails, lambda: os.kill(os.getpid(), signal.SIGSEGV), lambda: {"n": 1})
    errors = "ValueError: too large", "exit status -11"
    assert [speed.apart(job) for job in jobs] == [*({"error": error} for error in errors), {"n": 1}]
    monkeypatch.setattr(speed, "MOST_SECONDS", 1)
    assert speed.apart(lambda: time.sleep(600)) == {"error": "it took longer than 1 s"}


def test_nothing_is_on_a_card_before_a_row_is_measured(monkeypatch):
    """A process that has used CUDA cannot be forked."""

    def refuse():
        raise AssertionError("CUDA is used")

    for name in ("_lazy_init", "is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    bench = speed.Bench(dry=False)
    assert len([job for group in speed.GROUPS.values() for job in group(bench)]) > 100
    assert "CUDA is used" in speed.attempt(next(speed.steps(bench)))["error"]


def test_the_first_measurement_waits_for_the_clocks(monkeypatch):
    """An idle card has low ones. Afterwards nothing is waited for."""
    now = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    timer = timing.Timer(torch.device("cpu"), timing.Scale(times=3, warm_up=40))
    calls = []
    timer.each(lambda: calls.append(1))
    first = len(calls)
    timer.each(lambda: calls.append(1))
    assert first >= 39 + 4 and len(calls) - first == 4
    assert timing.Scale().warm_up > 0


def test_a_row_has_its_clock(monkeypatch):
    monkeypatch.setattr(speed, "clock", lambda: "1980")
    job = next(speed.rest(speed.Bench(dry=True)))
    row = speed.attempt(job)
    assert row["mhz"] == "1980"
    text = markdown({"speed-rest": {"verdict": PASS, "seconds": 1.0, "found": "", "rows": [row]}})
    assert "| call µs | MHz |" in text and text.rstrip().count("| 1980 |") == 1


def test_the_build_finds_a_toolkit_that_is_not_on_path(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(build, "tool", lambda name: f"/toolkit/bin/{name}")
    monkeypatch.setattr(build.subprocess, "run", lambda command, **how: ran.append(how))
    build.main()
    assert ran[0]["env"]["PATH"].split(os.pathsep) == [*os.environ["PATH"].split(os.pathsep), "/toolkit/bin"]
    assert ran[0]["env"]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "toolkit" not in capsys.readouterr().out


def test_tests_that_the_parts_run_are_there():
    for chosen in parts.all_parts(dry=True):
        for argument in chosen.command:
            if argument.startswith("tests/"):
                assert (ROOT / argument).is_file(), argument
    suite = parts.suite()
    assert len(suite) == len(set(suite)) > 20
    assert "graphs" in suite[0] and any(word in suite[-1] for word in parts.LATE)


def test_expected_times_follow_from_the_bytes():
    """Those of the page that a card's column is for: a launch, or the bytes at 85 to 88 % of an H100's bandwidth."""
    text = (
        (ROOT / "docs" / "cuda.md")
        .read_text("utf-8")
        .split("| operation | shape | MB | expected µs | measured µs |")[1]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()[2:]]
    assert {operation for operation, *_ in rows} >= {"reverse step", "linear step of UniPC"}
    moved = {"reverse step": 12, "linear step of UniPC": 24, "extended step with guidance": 16}
    for operation, shape, megabytes, expected, measured in rows:
        size = moved[operation] * math.prod(map(int, shape.split("x")))
        assert float(megabytes.replace(",", "")) == pytest.approx(size / 1e6, rel=0.1)
        low, *high = map(float, expected.split(" to "))
        bound = size / 3.35e6  # µs
        if size > 1e8:
            assert (low, *high) == pytest.approx((bound / 0.88, bound / 0.85), rel=0.01)
        assert low >= max(2.4, bound) and (measured == "" or float(measured) > 0)


def test_the_sanitizer_runs_under_each_tool(monkeypatch):
    monkeypatch.setattr(parts, "tool", lambda name: name)
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        found = next(chosen.command for chosen in parts.all_parts(dry=False) if chosen.name == tool)
        assert found[:3] == ("compute-sanitizer", "--tool", tool)
        assert ("kns=ddpm_ext" in found) == (tool != "initcheck")
    monkeypatch.setattr(parts, "tool", lambda name: None)
    assert parts.sanitizer("memcheck", 9).command == parts.counters(9).command == ()


def test_the_order_is_that_of_value():
    """Of the parts, and of the operations: first what most loops and trainings take."""
    operations = [way.operation for way in REST]
    assert operations[: len(WITH_OPTIONS) + 1] == [*WITH_OPTIONS, "loss and slope"]
    assert max(map(operations.index, ("x_start_scale", "output_scale"))) < operations.index("randn")
    names = [chosen.name for chosen in parts.all_parts(dry=False)]
    speeds = ["speed-steps", "speed-loop", "speed-rest"]
    checks = ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert names == ["machine", "build", "bits", *speeds, "costs", "counters", "suite", *checks]


# ------------------------------------------------------------------------------------------------------ a cut-off

NO_ERRORS = "========= ERROR SUMMARY: 0 errors\n"
CALLS = "".join(json.dumps({"operation": name, "dtype": "float32"}) + "\n" for name in ("p_sample", "randn"))
KERNELS = "==PROF== Disconnected\n" + "".join(
    ",".join(f'"{cell}"' for cell in line) + "\n"
    for line in (
        ("ID", "Kernel Name", *COUNTERS.values()),
        ("", "", *["unit"] * len(COUNTERS)),
        ("0", "void ddpm_ext::f<a, b>(c)", *map(str, range(len(COUNTERS)))),
        ("1", "void ddpm_ext::g(c)", *map(str, range(10, 10 + len(COUNTERS)))),
    )
)
TIMES = {"us": 1.0, "us_low": 0.5, "us_high": 2.0}
TIMED = {"operation": "p_sample", "way": "eager", "shape": [1], "dtype": "float32", "moved_bytes": 12, "call": TIMES}
WHOLE = {
    logs.read_rows: f"{json.dumps(TIMED)}\n" * 2,
    logs.read_pytest: "tests/a.py::test_a PASSED [ 50%]\ntests/a.py::test_b SKIPPED (why) [100%]\n",
    logs.read_sanitizer: "========= COMPUTE-SANITIZER\ntests/a.py::test_a PASSED [100%]\n" + NO_ERRORS,
    logs.read_counters: CALLS + KERNELS,
}


@pytest.mark.parametrize("read", WHOLE, ids=lambda read: read.__name__)
def test_a_log_may_end_anywhere(read):
    for end in range(len(WHOLE[read]) + 1):
        assert read(WHOLE[read][:end], None).verdict == CUT_OFF
    assert read(WHOLE[read], 0).verdict == PASS


def test_every_part_may_be_cut_off(monkeypatch, tmp_path):
    """Each prints half of what it has to say and then hangs; the next one runs, and all that was printed is kept."""
    monkeypatch.setattr(parts, "tool", lambda name: name)
    chosen = [MACHINE]
    for real in parts.all_parts(dry=False)[1:]:
        log = WHOLE[real.read]
        hang = f"print({log[: len(log) * 3 // 5]!r}, end='', flush=True); {OVER}"
        chosen.append(dataclasses.replace(real, command=(sys.executable, "-c", hang), environment={}))
    status, found = run(monkeypatch, tmp_path, *chosen)
    assert status == 0
    assert {name: p["verdict"] for name, p in found.items()} == {p.name: CUT_OFF for p in chosen} | {"machine": PASS}
    assert found["speed-rest"]["rows"] == [TIMED] and found["suite"]["found"] == "1 passed"


def test_a_machine_part_that_is_cut_off_is_no_missing_card(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "GRACE", 0.2)
    monkeypatch.setattr(script, "LEAST", 0.1)
    slow = part("machine", "import time; time.sleep(600)", seconds=1)
    assert script.run_all([slow, part("bits", row(n=1))], 1001, tmp_path) == 0
    results = json.loads((tmp_path / "unknown-card.json").read_text())["parts"]
    assert [results[name]["verdict"] for name in ("machine", "bits")] == [CUT_OFF, PASS]


# ------------------------------------------------------------------------------------------------------ reading logs


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


@pytest.mark.parametrize(
    "us, of_copy, found",
    [(2.0, 0.5, "a launch"), (2.4, 0.5, "neither"), (2.4, 0.9, "its bytes"), (2.0, 0.9, "its bytes")],
)
def test_what_follows_from_the_times_of_others(us, of_copy, found):
    empty = {"operation": "empty launch", "way": "", "shape": [], "dtype": "", "warm": {"us": 1.0}, "call": {"us": 4.5}}
    rows = [empty, step_row(STEPS[0].way, us, of_copy), step_row(ADD, 2.0), step_row(NEAR, 12.0, key="warm")]
    ((shape, dtype, of_empty, of_add, copy, eager, compiled, fast),) = bounds(rows)
    assert (shape, dtype, of_empty, copy, fast) == ("1x3x32x32", "float32", "2.00", f"{of_copy:.2f}", found)
    assert (of_add, eager, compiled) == (f"{us / 2:.2f}", "1.00", "nan")  # eager: by the call, which both have


PASSED = "tests/a.py::test_a[cuda-x y] PASSED [ 50%]\n"
SKIPPED = "tests/a.py::test_b SKIPPED (needs two GPUs) [ 75%]\n"
FAILED = "tests/a.py::test_c FAILED [100%]\n"


@pytest.mark.parametrize(
    "log, status, verdict, found",
    [
        (PASSED + SKIPPED, 0, PASS, "1 passed, 1 skipped"),
        (PASSED + FAILED, 1, FAIL, "first: tests/a.py::test_c"),
        (PASSED, None, CUT_OFF, "1 passed"),
        (PASSED + FAILED, None, FAIL, "first: tests/a.py::test_c"),
        (PASSED + "tests/a.py::test_d Fatal Python error: Segmentation fault", -11, FAIL, "exit status -11, 1 passed"),
        (SKIPPED, 0, NOT_MEASURED, "1 skipped"),
        ("ERROR: --device is 'cuda', but torch finds no GPU", 4, FAIL, "torch finds no GPU"),
    ],
)
def test_what_pytest_says(log, status, verdict, found):
    result = logs.read_pytest(log, status)
    assert result.verdict == verdict and found in result.found


def test_pytest_says_it_like_that(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_x(x): assert x == 'c'\n"
        "@pytest.mark.skip(reason='why')\ndef test_y(): pass\n"
        "@pytest.fixture\ndef f(): raise OSError\ndef test_z(f): pass\n"
    )
    arguments = [argument for argument in parts.pytest("test_it.py", dry=True) if argument not in ("--device", "cpu")]
    done = subprocess.run(arguments, cwd=tmp_path, env=WITHOUT_PYTEST, capture_output=True, text=True)
    counts, failed = logs.outcomes(done.stdout)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "error": 1}
    assert failed == ["test_it.py::test_x[a b]", "test_it.py::test_z"]


INVALID = "========= Invalid __global__ read of size 4 bytes\n"
OURS = INVALID + "=========     at void ddpm_ext::cuda::f()\n"
THREE = "========= ERROR SUMMARY: 3 errors\n"
HAZARD = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"


@pytest.mark.parametrize(
    "status, log, verdict",
    [
        (0, "========= COMPUTE-SANITIZER\n" + PASSED + "========= ERROR SUMMARY: 0 errors\n", PASS),
        (0, PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", PASS),
        (9, OURS + PASSED + THREE, FAIL),
        (9, OURS + PASSED + HAZARD, FAIL),
        (9, INVALID + "=========     at void at::native::f()\n" + PASSED + THREE, NOT_MEASURED),
        (1, "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors\n", NOT_MEASURED),
        (1, "Traceback\nImportError: no module\n", NOT_MEASURED),
        (1, FAILED + "========= ERROR SUMMARY: 0 errors\n", FAIL),
        (None, PASSED, CUT_OFF),
        (None, OURS + PASSED, FAIL),
    ],
)
def test_what_the_sanitizer_says(status, log, verdict):
    assert logs.read_sanitizer(log, status).verdict == verdict
