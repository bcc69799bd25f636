"""Memory of large results is marked for large pages, since the system would provide it in pages of 4 KiB otherwise."""

from pathlib import Path

import pytest
import torch

from ddpm_ext import GaussianDiffusion, randn

SMAPS = Path("/proc/self/smaps")
KNOWN = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = (4, 3, 512, 512)

pytestmark = pytest.mark.skipif(not (SMAPS.exists() and KNOWN.exists()), reason="of Linux with such pages")


def advised(x):
    """Whether the middle of a tensor's memory is marked for large pages (madvise)."""
    middle = x.data_ptr() + x.nbytes // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and ":" not in first:
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("the tensor's memory is in no mapping")


def results(shape):
    gd, x = GaussianDiffusion(), torch.zeros(shape)
    m = torch.zeros(shape, requires_grad=True)
    gd.train_losses(lambda *_: m, x, 5).backward()
    return gd.q_sample(x, 5), gd.p_sample(lambda *_: x, x, 5), randn(shape), m.grad


def test_large_results():
    assert all(advised(x) for x in results(LARGE))


def test_given_memory_stays_as_it_is():
    out = torch.empty(LARGE)
    before = advised(out)
    GaussianDiffusion().q_sample(torch.zeros(LARGE), 5, out=out)
    assert advised(out) == before
