"""benchmarks/gpu where there is no GPU: its dry run, and that its checks and verdicts can say no."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import bits, build, claims, costs, graphs, part, report, sanitizer
from benchmarks.gpu.context import Check, cores
from benchmarks.gpu.ways import OPERATIONS
from ddpm_ext import GaussianDiffusion, Philox

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------------------- dry run


@pytest.fixture(scope="module")
def dry(tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(folder)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "dry.json").read_text()), done.stdout


def test_dry_run_does_every_part(dry):
    _, content, _ = dry
    assert {name: p["status"] for name, p in content["parts"].items()} == dict.fromkeys(main.PARTS, "done")
    checks = [check for p in content["parts"].values() for check in p["results"].get("checks", [])]
    assert len(checks) > len(costs.MEASURES) * len(costs.STEPS)
    assert all(check["ok"] is True for check in checks)
    speed = content["parts"]["speed"]["results"]
    assert {row["operation"] for row in speed["kernels"]} == set(OPERATIONS)
    assert {row["cache"] for row in speed["kernels"]} == {"cold", "warm"}
    assert {row["way"] for row in speed["calls"]} >= {"ddpm_ext", "ddpm_ext, out=", "eager", "torch.randn"}
    assert any("torch.compile" in row["way"] for row in speed["calls"])
    trained = {row["way"] for row in speed["calls"] if row["operation"] == "train_losses"}
    assert {"ddpm_ext", "eager"} <= trained and any("torch.compile" in way for way in trained)
    assert not any("Error" in line for line in speed["skipped"])
    for row in speed["kernels"] + speed["calls"]:
        assert 0 <= row["us_low"] <= row["us"] <= row["us_high"]


def test_dry_run_claims_nothing_of_a_card(dry):
    _, content, output = dry
    assert [v["claim"] for v in content["verdicts"]] == [claim for claim, *_ in claims.CLAIMS]
    for v in content["verdicts"]:
        assert v["verdict"] == "not measured"
        assert v["found"].startswith("no card")
        assert f"not measured  {v['claim']}: no card" in output


def test_dry_run_writes_what_may_be_published(dry, root):
    folder, content, _ = dry
    assert sorted(path.name for path in folder.iterdir()) == ["dry.json", "dry.md"]
    text = (folder / "dry.md").read_text()
    assert text == report.markdown(content)
    for v in content["verdicts"]:
        assert v["claim"] in text
    for path in folder.iterdir():
        assert str(root) not in path.read_text()
        assert sys.prefix not in path.read_text()


def test_without_a_card(tmp_path, root):
    """Says why, and leaves nothing."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "finds no GPU" in done.stderr or "is built without CUDA" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- parts, time


def test_a_part_that_fails_or_takes_too_long():
    failed = part.run("no_such_part", 60, dry=True)
    assert failed["status"] == "failed"
    assert "No module named 'benchmarks.gpu.no_such_part'" in failed["error"][-1]
    late = part.run("bits", 0.2, dry=True)
    assert late["status"] == "cut off"
    assert late["seconds"] < 10


def test_a_part_in_a_process_of_its_own():
    found = part.run("build", 60, dry=True)
    assert (found["status"], found["error"]) == ("done", [])
    assert found["results"]["environment"] == build.environment((9, 0), cores())


def test_what_breaks_off_leaves_what_it_found(monkeypatch):
    def measure(context):
        context.check(Check("first", True, "seen"))
        raise SystemExit("enough")

    monkeypatch.setattr(bits, "measure", measure)
    found = part.run_here("bits", 60)
    assert found["status"] == "failed"
    assert found["error"][-1] == "SystemExit: enough"
    assert [check["name"] for check in found["results"]["checks"]] == ["first"]


def test_no_part_takes_the_time_of_the_later_ones():
    names = list(main.PARTS)
    left = float(main.BUDGET)
    for i, name in enumerate(names):
        seconds = main.limit(name, names[i + 1 :], left)
        assert main.LEAST < seconds <= left
        left -= seconds  # all takes as long as it may
    assert left == pytest.approx(0)
    assert main.BUDGET <= 480
    assert main.limit("speed", ["suite"], 100) > main.limit("speed", ["suite", "sanitizer"], 100)


def test_built_for_one_architecture():
    told = build.environment((12, 0), 16)
    assert (told["TORCH_CUDA_ARCH_LIST"], told["MAX_JOBS"], told["DDPM_EXT_CUDA"]) == ("12.0", "16", "1")


# --------------------------------------------------------------------------------------- checks that must say no


def test_one_bit_is_a_difference():
    x = torch.tensor([1.0, float("nan"), 0.0, 3.0])
    assert bits.different(x.clone(), x) == 0
    assert bits.different(torch.nextafter(x, torch.full_like(x, 9)), x) == 3
    assert bits.different(torch.tensor([1.0, float("nan"), -0.0, 3.0]), x) == 1
    assert bits.different(x.bfloat16(), x) == 4
    assert bits.different(x[:2], x) == 4


@pytest.mark.parametrize("op", ["reverse_step", "extended_step", "diffusion_loss"])
def test_bits_notice_another_result(monkeypatch, op):
    right = bits.call

    def call(case, device, layout):
        result = right(case, device, layout)
        if layout == "padded" and case.op == op:
            result.view(-1)[-1] += 1
        return result

    monkeypatch.setattr(bits, "call", call)
    assert bits.CHECKS["forward_process"](CPU, [(2, 3, 4)]).ok
    found = bits.CHECKS[op](CPU, [(2, 3, 4)])
    assert found.ok is False
    assert "padded" in found.found and "1 elements differ" in found.found


@pytest.mark.parametrize(
    "measure, step",
    [
        ("launches", lambda i, o: i.gd.p_sample(lambda *_: i.m, i.gd.q_sample(i.x, i.t), i.t, **o)),
        ("allocations", lambda i, o: i.gd.p_sample(lambda *_: i.m.clone(), i.x, i.t, **o)),
        ("allocations with out=", lambda i, o: i.gd.p_sample(lambda *_: i.m, i.x, i.t)),
    ],
)
def test_costs_notice_more(measure, step):
    assert costs.MEASURES[measure](step, costs.inputs(CPU), CPU).ok is False


@pytest.mark.parametrize(
    "more, name",
    [
        (lambda i, found: i.gd.q_sample(i.x, i.t), "launches"),
        (lambda i, found: found.clone(), "allocations"),
    ],
)
def test_costs_notice_more_of_training(monkeypatch, more, name):
    right = costs.train
    assert all(check.ok for check in costs.check_training("drawn", CPU))

    def train(i, noise):
        found = right(i, noise)
        return found, more(i, found)

    monkeypatch.setattr(costs, "train", train)
    wrong = [check.name for check in costs.check_training("drawn", CPU) if check.ok is False]
    assert f"{name}: train_losses, noise drawn" in wrong


def test_graphs_notice_a_seed_that_stays():
    gd = GaussianDiffusion(1000)
    x = torch.zeros(2, 3)
    burnt_in = Philox(1)

    def forward(rng, device):
        return gd.q_sample(x, 500, rng=rng if rng.seed is None else burnt_in)

    ok, found = graphs.check(forward, CPU)
    assert not ok
    assert "elements differ" in found


# ------------------------------------------------------------------------------------------------------- verdicts


def parts_with(**changes):
    """What a run on a card finds if all is well, with other parts in the place of some."""

    def checks(*names, ok=True):
        return {"checks": [{"name": name, "ok": ok, "found": "as it should"} for name in names]}

    kernel = {"operation": "p_sample", "dtype": "float32", "cache": "cold", "us": 2.0}
    rows = [
        kernel | {"shape": [64, 3, 512, 512], "moved_bytes": 10**9, "of_copy": 0.95, "of_empty": 90.0},
        kernel | {"shape": [1, 3, 32, 32], "moved_bytes": 10**4, "of_copy": 0.3, "of_empty": 1.2},
    ]
    results = {
        "build": {"seconds": 40.0, "environment": {"TORCH_CUDA_ARCH_LIST": "9.0"}},
        "bits": checks("reverse_step", "randn"),
        "costs": checks("launches: a", "synchronisation: a", "allocations: a", "allocations with out=: a"),
        "graphs": checks("graph: a"),
        "speed": {"l2_bytes": 10**7, "empty": {"us": 1.5, "what": "empty"}, "kernels": rows},
        "suite": checks("pytest a"),
        "sanitizer": checks("memcheck"),
    }
    parts = {name: {"status": "done", "seconds": 1.0, "results": r, "error": []} for name, r in results.items()}
    for name, change in changes.items():
        parts[name] = parts[name] | change
    return parts


def verdicts(**changes):
    judged = claims.judge(parts_with(**changes), dry=False)
    assert claims.failed(judged) == any(v.verdict == "FAIL" and v.correctness for v in judged)
    return {v.claim: v for v in judged}


def test_all_passes():
    assert {v.verdict for v in verdicts().values()} == {"pass"}


def check_results(name, ok):
    return {"results": {"checks": [{"name": name, "ok": ok, "found": "seven"}]}}


@pytest.mark.parametrize(
    "name, check, claim",
    [
        ("bits", "randn", "the CPU's bits, noise included"),
        ("costs", "launches: a", "a step is one launch"),
        ("costs", "synchronisation: a", "a step synchronises nothing"),
        ("costs", "allocations: a", "a step allocates its output alone"),
        ("costs", "allocations with out=: a", "a step allocates nothing with out="),
        ("graphs", "graph: a", "a graph replayed with another seed: the eager bits"),
        ("suite", "pytest a", "the tests pass on the card"),
        ("sanitizer", "memcheck", "compute-sanitizer finds nothing"),
    ],
)
def test_a_check_that_fails_or_can_not_be_told(name, check, claim):
    failing = verdicts(**{name: check_results(check, False)})
    assert (failing[claim].verdict, failing[claim].correctness) == ("FAIL", True)
    assert "seven" in failing[claim].found
    assert verdicts(**{name: check_results(check, None)})[claim].verdict == "not measured"


def test_a_crash_fails_and_a_cut_off_does_not():
    claim = "the CPU's bits, noise included"
    crashed = verdicts(bits={"status": "failed", "error": ["CUDA error: an illegal memory access"]})[claim]
    assert crashed.verdict == "FAIL" and "illegal" in crashed.found
    cut_off = verdicts(bits={"status": "cut off", "error": ["after 9 s"]})[claim]
    assert cut_off.verdict == "not measured" and "2 of 2" in cut_off.found
    assert (
        verdicts(build={"status": "failed", "error": ["nvcc"]})["it builds for this card and loads"].verdict == "FAIL"
    )


def test_a_slow_step_fails_its_claim_and_not_the_run():
    parts = parts_with()
    parts["speed"]["results"]["kernels"][0]["of_copy"] = 0.89
    parts["speed"]["results"]["kernels"][1]["of_empty"] = 1.6
    judged = claims.judge(parts, dry=False)
    assert [v.verdict for v in judged if not v.correctness] == ["FAIL", "FAIL"]
    assert "89.0 %" in next(v.found for v in judged if "bandwidth" in v.claim)
    assert not claims.failed(judged)


def test_no_part_but_the_machine():
    assert {v.verdict for v in claims.judge({}, dry=False)} == {"not measured"}


INVALID = "========= Invalid __global__ read of size 4 bytes\n"
THREE = "40 cases\n========= ERROR SUMMARY: 3 errors\n"
HAZARD = "40 cases\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"


@pytest.mark.parametrize(
    "tool, status, output, ok",
    [
        ("memcheck", 0, "========= COMPUTE-SANITIZER\n40 cases\n========= ERROR SUMMARY: 0 errors\n", True),
        ("racecheck", 0, "40 cases\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", True),
        ("memcheck", 9, f"{INVALID}=========     at void ddpm_ext::cuda::f()\n{THREE}", False),
        ("racecheck", 9, f"{INVALID}=========     at void ddpm_ext::cuda::f()\n{HAZARD}", False),
        ("initcheck", 9, f"{INVALID}=========     at void at::native::f()\n{THREE}", None),
        ("memcheck", 1, "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors\n", None),
        ("memcheck", 1, "Traceback\nImportError: no module\n", None),
        ("memcheck", None, "", None),
    ],
)
def test_what_the_sanitizer_says(tool, status, output, ok):
    assert sanitizer.verdict(tool, status, output).ok is ok


def test_names_of_files():
    assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
