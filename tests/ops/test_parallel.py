"""Parallel loops of the CPU kernels: every compiler's code runs on the threads of torch's own operators."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from support.compilers import find_compiler
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["g++", "clang++"])
def library(request, tmp_path_factory) -> ctypes.CDLL:
    compiler = find_compiler(request.param)
    target = tmp_path_factory.mktemp("parallel") / "trial.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    source = ROOT / "tests" / "support" / "parallel_trial.cpp"
    subprocess.run([compiler, *flags, source, *libraries, "-o", target], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def parts(library: ctypes.CDLL, count: int, grain: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The thread of each index, and where its part begins. Every index is called once."""
    calls, threads, begins = torch.zeros(3, count, dtype=torch.int64)
    library.mark_threads(
        ctypes.c_int64(count), ctypes.c_int64(grain), pointer(calls), pointer(threads), pointer(begins)
    )
    assert calls.tolist() == [1] * count
    return threads, begins


@pytest.mark.parametrize(
    ("count", "grain", "used"),
    [(0, 1, 0), (1, 1, 1), (5, 5, 1), (6, 5, 2), (7, 3, 3), (1000, 400, 3), (1000, 500, 2), (1000, 1, 3)],
)
def test_a_loop_takes_as_many_threads_as_it_has_parts(library, three_threads, count, grain, used):
    threads, begins = parts(library, count, grain)
    assert len(threads.unique()) == len(begins.unique()) == used


def test_torchs_number_of_threads_is_obeyed(library, three_threads):
    assert len(parts(library, 100, 1)[0].unique()) == 3
    torch.set_num_threads(1)
    assert len(parts(library, 100, 1)[0].unique()) == 1


def test_a_loop_inside_a_loop_stays_on_its_thread(library, three_threads):
    threads = torch.zeros(3, 50, dtype=torch.int64)
    library.mark_nested(ctypes.c_int64(3), ctypes.c_int64(50), pointer(threads))
    assert [len(row.unique()) for row in threads] == [1, 1, 1]
    assert len(threads.unique()) == 3


def test_no_other_parallel_loop():
    """at::parallel_for is a serial loop in code that is compiled without OpenMP, as this project's is."""
    users = [path.name for path in (ROOT / "csrc").rglob("*.*") if "at::parallel_" in path.read_text(encoding="utf-8")]
    assert users == ["parallel.h"]
