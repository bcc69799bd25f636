"""The CUDA kernels on the stand-in for CUDA's runtime, where they move samples by words: see test_cuda_host.py."""

from __future__ import annotations

import pytest
from support.cuda_host.calls import VARIANTS, make_call, moves_by_words, variant_name

pytest_plugins = "support.cuda_host.fixtures"
pytestmark = pytest.mark.usefixtures("one_thread")
DRAWN = [v for v in VARIANTS if v[1].startswith("drawn") and v[0] != "randn"]


@pytest.mark.parametrize("variant", DRAWN, ids=variant_name)
def test_channels_last_where_noise_is_drawn(host, variant):
    """By words if they are aligned: warps that have idle threads, blocks of several samples, rows without noise."""

    def last(*shape, gap=8, more=0):
        apart = shape[0] + more  # how far pixels are
        strides = (shape[1] * shape[2] * apart + gap, 1, shape[2] * apart, apart)
        call = make_call(variant, 8, *shape)
        return call.with_tensors(lambda _, x: x.new_empty_strided(x.shape, strides).copy_(x))

    for call in map(last, (3, 3, 4, 5, 12, 32), (5, 8, 16, 64, 4, 4), (8, 8, 16, 64, 16, 4)):
        moves_by_words(host, call)
    others = last(1, 8, 32), last(8, 5, 7), last(33, 4, 4), last(4, 8, 8, gap=1), last(3, 2, 2, gap=4)
    for call in (*others, last(3, 8, 8, more=5)):
        host.check(call)
    for name in (*call.read, "out"):
        host.check(last(8, 8, 4), {name: "odd"})
