"""The CPU kernels of AArch64, cross-compiled and run by an emulator, give the bits of the module compiled for this CPU.

On an AArch64 machine tests/ops/test_instruction_sets.py compares them.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.compilers import find_compiler
from support.cpu_host.calls import all_calls, read, write
from support.rounding import same_bits

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


def test_all_bits_are_those_of_this_cpu(program, tmp_path):
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
