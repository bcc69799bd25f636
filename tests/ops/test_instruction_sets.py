"""Every instruction set gives the same bits: those that DDPM_EXT_CPU can name here, and AArch64's by an emulator.

A wrong name raises one clear error.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.compilers import find_compiler
from support.cpu_host.calls import all_calls, read, write
from support.rounding import same_bits

# The features that a CPU must have, by their names in /proc/cpuinfo. Better sets come later.
NEEDS = {
    "portable": set(),
    "neon": {"asimd"},
    "sse2": {"sse2"},
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw"},
}

PROGRAM = """
import sys
import torch
import ddpm_ext
from support.cpu_host.calls import all_calls

results = {f"{call.what} {name}": result for call in all_calls() for name, result in call.results.items()}
results["randn long"] = ddpm_ext.randn((1, 2_000_003), ddpm_ext.Philox(1))
torch.save({key: result.detach().clone() for key, result in results.items()}, sys.argv[1])
print(ddpm_ext.build_info()["cpu"])
"""


def run(root: Path, name: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "DDPM_EXT_CPU"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env["OMP_NUM_THREADS"] = "1"
    if name is not None:
        env["DDPM_EXT_CPU"] = name
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def flags() -> set[str]:
    if platform.machine() in ("aarch64", "arm64"):
        return {"asimd"}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def available() -> list[str]:
    return [name for name, needs in NEEDS.items() if needs <= flags()]


@pytest.fixture(scope="module")
def results(root, tmp_path_factory):
    """The results of each instruction set, by its name. The best is chosen where none is named."""
    found = {}
    for name in available():
        path = tmp_path_factory.mktemp("bits") / f"{name}.pt"
        done = run(root, None if name == available()[-1] else name, "-c", PROGRAM, str(path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == name
        found[name] = torch.load(path)
    return found


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "portable"])
def test_same_bits_as_portable(results, name):
    if name not in results:
        pytest.skip(f"this CPU has no {name}")
    assert results[name].keys() == results["portable"].keys()
    for key, expected in results["portable"].items():
        assert same_bits(results[name][key], expected), key


def test_the_best_is_chosen_for_an_empty_name(root):
    done = run(root, "", "-c", "import ddpm_ext; print(ddpm_ext.build_info()['cpu'])")
    assert done.stdout.strip() == available()[-1], done.stderr


WRONG = """
import ddpm_ext, torch
from ddpm_ext import ops
for call in (
    lambda: ddpm_ext.randn((1, 4), ddpm_ext.Philox(0)),
    lambda: ops.forward_process(torch.zeros(1, 4), torch.ones(1, 2), 0, add_noise=False),
    lambda: ddpm_ext.build_info(),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_a_wrong_name_is_one_clear_error(root):
    """Two, and one of another CPU."""
    lacking = [name for name in NEEDS if name not in available()]
    for name in ("portable,avx2", *(lacking[-1:] or ["AVX2"])):
        done = run(root, name, "-c", WRONG)
        assert done.returncode == 0, done.stderr
        expected = f"DDPM_EXT_CPU is '{name}', expected one that this CPU has: {', '.join(reversed(available()))}"
        assert done.stdout.splitlines() == [expected] * 3


# -------------------------------------------------------------------------------------------------- another machine's

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"  # Debian's g++-aarch64-linux-gnu and qemu-user


@pytest.fixture(scope="module")
def program(root, tmp_path_factory) -> Path:
    compiler = find_compiler(COMPILER)
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"there is no {EMULATOR} on PATH")
    csrc, host = root / "csrc", root / "tests" / "support" / "cpu_host"
    sources = [csrc / "cpu" / name for name in ("isa/neon.cpp", "operators.cpp", "scales.cpp", "dispatch.cpp")]
    target = tmp_path_factory.mktemp("aarch64") / "run"
    flags = ["-std=c++20", "-O1", "-static", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    include = [f"-I{host / 'include'}", f"-I{csrc}"]
    subprocess.run([compiler, *flags, *include, *sources, host / "main.cpp", "-o", target], check=True)
    return target


def test_aarch64_gives_the_bits_of_this_cpu(program, tmp_path):
    calls = list(all_calls())
    write(tmp_path / "calls", calls)
    command = [EMULATOR, program, tmp_path / "calls", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "neon\n"
    for call, got in zip(calls, read(tmp_path / "results"), strict=True):
        for name, expected in call.results.items():
            found, expected = got[name], expected.detach().reshape(-1)
            if name.endswith("slope"):  # autograd has rounded it to the model's dtype
                dtype = call.arguments["model_output"].dtype
                found, expected = found.to(dtype), expected.to(dtype)
            assert same_bits(found, expected), f"{call.what} {name}"
