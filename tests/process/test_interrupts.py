"""Ctrl-C at any instruction of a step or a loop leaves torch's gradient mode as it was.

Python handles a signal between two instructions, but not between any two: after calls, at a function's start, and where
a loop jumps back. So the signal arrives in C, as a real one does, before each instruction in turn, and Python chooses
when to raise KeyboardInterrupt. `with torch.no_grad()` would not pass: its __exit__ is a function in Python, at the
start of which a signal is handled.
"""

import ctypes
import gc
import signal
import sys

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Philox
from ddpm_ext.loop.loop import Loop
from ddpm_ext.loop.step import LoopStep

GD = GaussianDiffusion(20, variance="learned_range", backend="reference")
PLAIN = GaussianDiffusion(20)


def model(x, t):
    return torch.cat([x, x], 1)


def take_a_loop(gd, model):
    gd.p_sample_loop(model, (1, 1, 2), steps=2, rng=Philox(0), record="last", progress=False)


class Interruption:
    """A signal that arrives before the instruction of a number, counted over the frames of some functions."""

    def __init__(self, number, functions):
        self.left, self.codes = number, {function.__code__ for function in functions}
        self.raised = False
        # What CPython calls in a handler of signals written in C. It ignores the arguments of a trace function.
        self.arrive = ctypes.PyDLL(None).PyErr_SetInterrupt
        self.arrive.argtypes, self.arrive.restype = [ctypes.py_object] * 3, None

    def trace(self, frame, event, _):
        if frame.f_code not in self.codes or self.left < 0:
            return None
        frame.f_trace_opcodes = True
        return self.count

    def count(self, frame, event, _):
        if event != "opcode":
            return self.count
        self.left -= 1
        if self.left >= 0:
            return self.count
        # The next event is C's: no Python runs between the signal and the frame's instruction, or its callers'.
        while (frame := frame.f_back) is not None:
            frame.f_trace = None
        return self.arrive

    def handle(self, number, frame):
        sys.settrace(None)
        if not self.raised:
            self.raised = True
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("take", "functions"),
    [
        (lambda: GD.p_sample(model, torch.ones(1, 1, 2), 3, rng=Philox(0)), [GaussianDiffusion.p_sample]),
        (lambda: take_a_loop(GD, model), [Loop.run, LoopStep.take]),
        (lambda: take_a_loop(PLAIN, lambda x, t: x), [Loop.run, LoopStep.take]),
    ],
)
def test_an_interrupt_at_any_instruction_restores_the_gradient_mode(take, functions):
    take()  # what is made once is made
    before, traced = signal.getsignal(signal.SIGINT), sys.gettrace()
    raised, left_off = 0, []
    for number in (2000, *range(2000)):  # at first to the end: some versions of Python count from the second run on
        interruption = Interruption(number, functions)
        with torch.enable_grad():
            gc.disable()  # its callbacks, such as hypothesis', would swallow an interrupt, and Python only print it
            signal.signal(signal.SIGINT, interruption.handle)
            try:
                sys.settrace(interruption.trace)
                take()
                sys.gettrace()  # a call, after which the signal is handled at the latest
            except KeyboardInterrupt:
                raised += 1
            finally:
                sys.settrace(traced)
                signal.signal(signal.SIGINT, before)
                gc.enable()
            if not torch.is_grad_enabled():
                left_off.append(number)
        if interruption.left >= 0 and number < 2000:
            break
    assert interruption.left >= 0 and raised > 30
    assert not left_off
