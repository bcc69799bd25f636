"""Fixtures of the tests that run the CUDA kernels on the CPU, with the stand-in for CUDA's runtime."""

from __future__ import annotations

import zlib

import pytest
from support.cuda_host.calls import open_host
from support.cuda_host.windows import Windows


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
    """The Host that runs the CUDA kernels, with default settings. Its threads' order depends on the test's name."""
    control = one_host.control
    control.set_seed(zlib.crc32(request.node.name.encode()))
    control.take_launches()
    yield one_host
    control.set_blocks(None)
    control.set_rsqrt(3)
    control.set_refuse(False)
    control.set_device(0)
