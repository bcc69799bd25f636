"""benchmarks/gpu where there is no GPU: how it runs its parts, reads their logs and writes their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import parts, speed
from benchmarks.gpu.parts import CUT_OFF, FAIL, NOT_MEASURED, PASS, ROOT, Part
from benchmarks.gpu.report import markdown
from benchmarks.gpu.ways import MOVED

WITHOUT_PYTEST = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


def part(name, code, seconds=100.0, read=parts.read_rows):
    return Part(name, seconds, (sys.executable, "-c", code), read)


def row(**values):
    return f"print({json.dumps(values)!r}, flush=True); "


MACHINE = part("machine", row(card="Card 1"), seconds=4)


def run(monkeypatch, folder, *chosen):
    """The exit status and the results."""
    monkeypatch.setattr(script, "GRACE", 0.5)
    monkeypatch.setattr(script, "LEAST", 0.1)
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
    missing = Part("missing", 100, ("no such program",), parts.read_rows)
    raises = part("raises", "raise SystemExit('no memory')")
    not_installed = Part("not installed", 100, (), parts.read_rows)
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
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    slow = part("slow", row(n=1) + child + "print('{\"n\": ', end='', flush=True); " + deaf, seconds=2)
    started = time.monotonic()
    status, found = run(monkeypatch, tmp_path, MACHINE, slow, part("last", row(n=2)))
    assert status == 0
    assert time.monotonic() - started < 60
    assert (found["slow"]["verdict"], found["slow"]["rows"]) == (CUT_OFF, [{"n": 1}])
    assert found["last"]["verdict"] == PASS
    log = (tmp_path / "card-1.log").read_text()
    pid = int(log.partition("child ")[2].split()[0])
    for _ in range(100):
        if not alive(pid):
            break
        time.sleep(0.1)
    assert not alive(pid)


def alive(pid):
    """A process that is not only waiting to be collected by its parent."""
    try:
        with open(f"/proc/{pid}/stat") as line:
            return line.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_part_is_asked_before_it_is_ended(monkeypatch, tmp_path):
    """So pytest still says how tests failed."""
    polite = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('how it failed')"
    _, found = run(monkeypatch, tmp_path, MACHINE, part("slow", polite, seconds=2))
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
    given = []
    monkeypatch.setattr(script, "result_of", lambda part, seconds, log: given.append(seconds) or parts.Result(PASS, ""))
    chosen = parts.all_parts(dry=False)
    budget = sum(part.seconds for part in chosen)
    script.run_all(chosen, budget, tmp_path)
    assert budget <= 480
    assert given[0] == pytest.approx(chosen[0].seconds, abs=1)
    assert given[-1] == pytest.approx(budget, abs=5)
    assert given == sorted(given)


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


def test_interrupted(tmp_path):
    """By a machine that ends it, say: the results so far stay, and nothing runs on."""
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path), "--only", "speed-rest"]
    process = subprocess.Popen(arguments, cwd=ROOT, env=WITHOUT_PYTEST, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "speed-rest" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert list(json.loads((tmp_path / "none-dry-run.json").read_text())["parts"]) == ["machine"]


def test_a_dry_run(tmp_path):
    done = command("--dry", "--out", tmp_path, "--only", "speed-loop")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "none-dry-run.json").read_text())["parts"]
    assert {name: p["verdict"] for name, p in found.items()} == dict.fromkeys(["machine", "speed-loop"], PASS)
    ways = {row["way"] for row in found["speed-loop"]["rows"]}
    assert {"ddpm_ext, no graph", "ddpm_ext, step graph", "ddpm_ext, loop graph"} == ways


@pytest.mark.filterwarnings("ignore:graph. steps are not captured")
def test_every_operation_and_way_is_timed():
    """On the CPU, with tiny sizes."""
    bench = speed.Bench(dry=True)
    rows = [row for group in speed.GROUPS for row in speed.measured(group, bench)]
    assert not [row for row in rows if "error" in row]
    ways = {name: {row["way"] for row in rows if row["operation"] == name} for name in {r["operation"] for r in rows}}
    assert set(ways) == {*MOVED, "a step of a loop", "empty launch"}
    assert {"ddpm_ext, out=", "eager", "eager, tables on the device", "torch.compile of eager"} <= ways["p_sample"]
    assert {"ddpm_ext", "eager", "torch.compile of eager"} <= ways["train_losses"]
    assert {"ddpm_ext", "torch.randn"} <= ways["randn"]
    for row in rows:
        for found in (row[name] for name in ("cold", "warm", "call") if name in row):
            assert 0 <= found["us_low"] <= found["us"] <= found["us_high"]
    text = markdown({"speed-all": {"verdict": PASS, "seconds": 1.0, "found": "", "rows": rows}})
    assert all(f"| {operation} |" in text for operation in ways)


def test_a_way_that_fails_loses_no_other(monkeypatch):
    def fails():
        raise ValueError("too large\nand more")

    monkeypatch.setitem(speed.GROUPS, "loop", lambda bench: iter([fails, lambda: {"n": 1}]))
    assert list(speed.measured("loop", None)) == [{"error": "ValueError: too large"}, {"n": 1}]


def test_tests_that_the_parts_run_are_there():
    for chosen in parts.all_parts(dry=True):
        for argument in chosen.command:
            if argument.startswith("tests/"):
                assert (ROOT / argument).is_file(), argument
    suite = parts.suite()
    assert len(suite) == len(set(suite)) > 20
    assert "graphs" in suite[0] and any(word in suite[-1] for word in parts.LATE)


def test_the_sanitizer_runs_under_each_tool(monkeypatch):
    monkeypatch.setattr(parts, "compute_sanitizer", lambda: "compute-sanitizer")
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        found = next(chosen.command for chosen in parts.all_parts(dry=False) if chosen.name == tool)
        assert found[:3] == ("compute-sanitizer", "--tool", tool)
        assert ("kns=ddpm_ext" in found) == (tool != "initcheck")
    monkeypatch.setattr(parts, "compute_sanitizer", lambda: None)
    assert parts.sanitizer("memcheck", 9).command == ()


# ------------------------------------------------------------------------------------------------------ reading logs

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
    result = parts.read_pytest(log, status)
    assert result.verdict == verdict and found in result.found


def test_pytest_says_it_like_that(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_x(x): assert x == 'c'\n"
        "@pytest.mark.skip(reason='why')\ndef test_y(): pass\n"
        "@pytest.fixture\ndef f(): raise OSError\ndef test_z(f): pass\n"
    )
    arguments = [argument for argument in parts.pytest("test_it.py", dry=True) if argument not in ("--device", "cpu")]
    done = subprocess.run(arguments, cwd=tmp_path, env=WITHOUT_PYTEST, capture_output=True, text=True)
    counts, failed = parts.outcomes(done.stdout)
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
    assert parts.read_sanitizer(log, status).verdict == verdict
