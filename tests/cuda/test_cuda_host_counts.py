"""The zeros in which a reduction's blocks count themselves: whose memory they are, by the stand-in for CUDA."""

from __future__ import annotations

import pytest
import torch
from support.cuda_host.calls import assert_same_bits, values
from support.step_inputs import make_table

from ddpm_ext.ops.extension import C

pytest_plugins = "support.cuda_host.fixtures"
pytestmark = pytest.mark.usefixtures("one_thread")


def reductions(module, batch=2):
    """The results of every operator that counts its blocks, of which each sample has several."""
    m, x, u = (values(batch, 20_000, seed=seed, special=False) for seed in range(3))
    rng = (None, 5, None, 0, 2, -1, None)
    losses = module.diffusion_loss(m, x, torch.ones(1, 4), None, 0, 0, 1.0, None, *rng, 0, True, False, False, False)
    threshold = module.x_start_scale(x, m, make_table(8), None, 1, 0.9, 7.0, None, None)
    return *losses, threshold, module.output_scale(m, u, 3.0, 0.7)


def check(host, batch=2):
    for got, expected in zip(reductions(host.operators, batch), reductions(C, batch), strict=True):
        assert_same_bits(got, expected)


def test_they_are_not_in_memory_of_torchs_allocator(host):
    """It may draw from a CUDA graph's pool without a capture, as torch.compile's "reduce-overhead" makes it do before
    it captures, and then gives that memory to others."""
    for _ in range(2):
        check(host)
        assert host.control.blocks_of_allocator() == 0
        host.control.overwrite_memory_of_allocator()


def test_a_launch_that_is_captured_has_its_own(host):
    host.control.set_capturing(True)
    try:
        for _ in range(2):
            check(host)
            assert host.control.blocks_of_allocator() == 0
            host.control.overwrite_memory_of_allocator()
    finally:
        host.control.set_capturing(False)


def test_more_samples_than_before(host):
    """And few again, and after a launch that was refused."""
    check(host)
    check(host, 5)
    check(host)
    host.control.set_refuse(True)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        reductions(host.operators)
    host.control.set_refuse(False)
    check(host)


def test_memory_that_torch_holds_unused_is_given_back_for_them(host):
    """Where there is none even then, it is an error, and nothing is wrong afterwards."""
    emptied = host.control.caches_emptied()
    host.control.set_full(1)
    check(host, 12)
    assert host.control.caches_emptied() == emptied + 1
    host.control.set_full(2)
    with pytest.raises(RuntimeError, match="CUDA error 2: out of memory"):
        check(host, 25)
    check(host, 25)
    check(host)
