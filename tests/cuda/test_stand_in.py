"""The stand-in for CUDA's runtime: who is next is decided by its seed, and what a kernel does wrong is found."""

from __future__ import annotations

import math

import pytest
import torch
from support.cuda_host import library
from support.cuda_host.calls import open_host, values
from support.cuda_host.guarded import PLACES, Placed

not_sanitized = pytest.mark.skipif(library.SANITIZED, reason="ends the process under AddressSanitizer")


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    return open_host(tmp_path_factory.getbasetemp()).control


def test_the_seed_picks_the_order(control):
    def order(seed, threads=256):
        control.set_seed(seed)
        return control.order_of_threads(threads)

    assert order(1) == order(1) != order(2)
    for threads in (1, 33, 1024):
        assert sorted(order(3, threads)) == list(range(threads))
    # no thread has a time of its own
    assert len({order(seed).index(0) for seed in range(50)}) > 40


WRONG = {
    "two_barriers": r"719: barriers that never open: of 64 threads, 0 ended, 32 wait at .*probe.cu:\d+, 32 wait at",
    "half_a_warp": r"719: barriers that never open: of 64 threads, 32 ended, 32 wait at",
    "stranger_in_warp": "719: a mask without the calling thread",
    "shuffle_from_outside": "719: a shuffle from a thread that the mask leaves out",
    "null_pointer": r"700: illegal access to address 0x[0-9a-f]+ in block \(\d, 0, 0\), thread",
    "misaligned": "700: undefined behaviour",
    "out_of_bounds": "700: undefined behaviour",
}


@not_sanitized
@pytest.mark.parametrize("kernel", WRONG)
def test_what_is_wrong_is_an_error(control, kernel):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=WRONG[kernel]):
            control.run_kernel(kernel, 3, 64)
        control.run_kernel("early_return", 3, 256)  # whose threads that ended are not waited for


def test_a_kernel_without_end_times_out(control):
    control.set_seconds(1)
    with pytest.raises(RuntimeError, match="702: the launch timed out"):
        control.run_kernel("endless", 3, 64)
    control.set_seconds(30)
    control.run_kernel("early_return", 3, 256)


def test_launches_that_cuda_refuses(control):
    for blocks, threads in [(0, 1), (1, 0), (1, 1025), (2**31, 1)]:
        with pytest.raises(RuntimeError, match="9: invalid configuration argument"):
            control.run_kernel("nothing", blocks, threads)
    control.run_kernel("nothing", 65536, 1)


def test_reciprocal_square_roots_vary_up_to_the_bound(control):
    bound = 2**-22.9
    x = torch.rand(3000, generator=torch.Generator().manual_seed(0)) * 48
    x = torch.cat([x, x * 2.0**-100, torch.tensor([2.0**-126, 3e38])])
    results = []
    for choice in range(4):
        control.set_rsqrt(choice)
        results.append(torch.tensor([control.rsqrt(v) for v in x.tolist()]))
        assert [control.rsqrt(v) for v in (0.0, -0.0, math.inf, 1e-40)] == [math.inf, -math.inf, 0.0, math.inf]
        assert math.isnan(control.rsqrt(-1.0)) and math.isnan(control.rsqrt(math.nan))
    nearest, least, greatest, some = results
    exact = x.double().rsqrt()
    assert torch.equal(nearest, exact.float())
    for y in results:
        assert ((y.double() / exact - 1).abs() <= bound).all()
        assert ((least <= y) & (y <= greatest)).all()
    for y, beyond in ((least, -math.inf), (greatest, math.inf)):
        assert ((y.nextafter(torch.tensor(beyond)).double() / exact - 1).abs() > bound).all()
    assert (least < nearest).float().mean() > 0.5 and (some != nearest).float().mean() > 0.3


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("written", [False, True])
def test_a_changed_byte_is_found(control, place, written):
    x = values(3, 10)[:, :7]
    for byte in (-1, 27, 28, 40, 108):  # before, in the first row, behind it, in the second, behind all
        placed = Placed(x, place, control)
        if not 0 <= placed.begin + byte < placed.pages.size:
            continue
        placed.pages.bytes[placed.begin + byte] ^= 1
        inside = byte in (27, 40)
        if inside and written:
            placed.done(written)
        else:
            with pytest.raises(AssertionError, match="written"):
                placed.done(written)
