"""The compiled module's functions: what counts as a number, results that are given, and other Python threads."""

import sys
import threading

import numpy as np
import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox, ops
from ddpm_ext.ops.extension import C

X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
TABLE = torch.linspace(0.1, 0.9, 16).reshape(8, 2)
# x_start, table, t, t_index, noise, draw_noise, seed, seed_value, sample_ids, first_id, stream, draw, draw_data
ARGUMENTS = (X, TABLE, None, 3, None, True, None, 5, None, 0, 2, -1, None)
EXPECTED = ops.forward_process(X, TABLE, 3, rng=Philox(5))


def changed(place, value):
    return (*ARGUMENTS[:place], value, *ARGUMENTS[place + 1 :])


@pytest.mark.parametrize(
    "place, value",
    [(3, np.int64(3)), (3, np.int32(3)), (5, np.bool_(True)), (7, np.uint8(5)), (2, torch.tensor([3, 3]))],
)
def test_what_counts_as_a_number(place, value):
    assert torch.equal(C.forward_process(*changed(place, value)), EXPECTED)


def test_a_float_may_be_an_int():
    x = X.clone()
    table = GaussianDiffusion(20).table("steps", "x_t", x)
    step = (x, 0.5 * x, table, None, 3)
    rest = (None, False, None, 0, None, 0, 0, -1, None, None)  # the last is the table on the host
    assert torch.equal(C.reverse_step(*step, -1, 1, *rest), C.reverse_step(*step, -1.0, np.float32(1), *rest))


def test_a_given_result_is_returned_itself():
    out = torch.empty_like(X)
    assert C.forward_process_out(*ARGUMENTS, out) is None and torch.equal(out, EXPECTED)
    assert ops.forward_process(X, TABLE, 3, rng=Philox(5), out=out) is out


def other_thread_runs(elements):
    """Whether another thread that waits gets its turn during some of many calls."""
    x, out = torch.zeros(1, elements), torch.empty(1, elements)
    gd, seen, closed = GaussianDiffusion(20), [], threading.Lock()
    step = gd.reverse_step(x, (-1.0, 1.0), None, Philox(1))

    def work():
        with closed:
            seen.append(threading.get_ident())

    def call():
        C.forward_process_out(x, TABLE, *ARGUMENTS[2:], out)
        step.take(x, x, None, 3, out)

    before, thread = sys.getswitchinterval(), threading.Thread(target=work)
    closed.acquire()
    try:
        sys.setswitchinterval(1000)  # a thread that holds the interpreter is not asked to let another one run
        thread.start()  # the other one holds it until it waits for the lock
        closed.release()
        for _ in range(2000):
            call()
            if seen:
                break
        found = bool(seen)
    finally:
        sys.setswitchinterval(before)
        thread.join()
    assert seen
    return found


@pytest.mark.parametrize("elements, runs", [(64, False), (2**20, True)])
def test_other_threads_run_during_a_long_call_alone(elements, runs):
    """To let them run takes longer than a short one. The test's own threads may ask for it, so one of a few tries is
    enough."""
    assert any(other_thread_runs(elements) == runs for _ in range(5))
