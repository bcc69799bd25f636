"""What the tests on the stand-in for CUDA's runtime share."""

from __future__ import annotations

import zlib

import pytest
import torch
from support.cuda_host.calls import open_host
from support.cuda_host.windows import Windows


@pytest.fixture(scope="module")
def one_thread():
    """For torch: its threads wait for each other longer than these tensors take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    return open_host(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def windows():
    try:
        return Windows()
    except MemoryError as error:
        pytest.skip(f"no address space for large tensors: {error}")


@pytest.fixture
def host(one_host, request):
    """With an order of threads of the test's own."""
    control = one_host.control
    control.set_seed(zlib.crc32(request.node.name.encode()))
    control.take_launches()
    yield one_host
    control.set_blocks(None)
    control.set_rsqrt(3)
    control.set_refuse(False)
    control.set_device(0)
