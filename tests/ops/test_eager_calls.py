"""Other Python threads run while an operator works for long."""

import sys
import threading

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox, ops

TABLE = torch.linspace(0.1, 0.9, 16).reshape(8, 2)


def other_thread_runs(elements):
    """Whether another thread that waits gets its turn during some of many calls."""
    x, out = torch.zeros(1, elements), torch.empty(1, elements)
    gd, seen, closed = GaussianDiffusion(20), [], threading.Lock()
    step = gd.reverse_step(x, (-1.0, 1.0), None, Philox(1))

    def work():
        with closed:
            seen.append(threading.get_ident())

    def call():
        ops.forward_process(x, TABLE, 3, rng=Philox(5), out=out)
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
