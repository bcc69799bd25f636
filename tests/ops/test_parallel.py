"""Parallel loops of the CPU kernels: every compiler's code runs on the threads of torch's own operators."""

from __future__ import annotations

import ctypes

import pytest
import torch
from support.compilers import compiled
from torch.utils import cpp_extension


@pytest.fixture(scope="module", params=["g++", "clang++"])
def library(request, tmp_path_factory) -> ctypes.CDLL:
    torchs = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    flags = ("-O1", "-Wall", "-Werror")
    return compiled(request.param, "parallel_trial.cpp", tmp_path_factory.mktemp("parallel"), flags, torchs)


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
def test_a_loop_takes_as_many_threads_as_it_has_parts(library, threads, count, grain, used):
    threads(3)
    found, begins = parts(library, count, grain)
    assert len(found.unique()) == len(begins.unique()) == used


def test_torchs_number_of_threads_is_obeyed(library, threads):
    for count in (3, 1):
        threads(count)
        assert len(parts(library, 100, 1)[0].unique()) == count


def test_a_loop_inside_a_loop_stays_on_its_thread(library, threads):
    threads(3)
    found = torch.zeros(3, 50, dtype=torch.int64)
    library.mark_nested(ctypes.c_int64(3), ctypes.c_int64(50), pointer(found))
    assert [len(row.unique()) for row in found] == [1, 1, 1]
    assert len(found.unique()) == 3


def test_no_other_parallel_loop(root):
    """at::parallel_for is a serial loop in code that is compiled without OpenMP, as this project's is."""
    users = [path.name for path in (root / "csrc").rglob("*.*") if "at::parallel_" in path.read_text(encoding="utf-8")]
    assert users == ["parallel.h"]
