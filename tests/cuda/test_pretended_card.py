"""The tests that need a card, on a pretended one, which refuses what a card refuses: their own faults are seen here.

Launches, which only a real card's profiler sees, are not counted; what else can't be pretended is in NOT_PRETENDED.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.pretended import environment

import ddpm_ext
from benchmarks.gpu.logs import outcomes

pytestmark = pytest.mark.skipif(ddpm_ext.build_info()["cuda"] is None, reason="ddpm_ext is built without CUDA")

FILES = (
    *("tests/cuda/test_card_bits.py", "tests/cuda/test_card_costs.py", "tests/cuda/test_card_graphs.py"),
    *("tests/cuda/test_card.py", "tests/loop/test_cuda_graphs.py", "tests/loop/test_costs.py"),
    "tests/training/test_captured_step.py",
)
MAY_BE_SKIPPED = ("26 GB of memory", "profiler saw 0 of")

BEGIN = """
import torch
x, host = torch.ones(4, device="cuda"), torch.ones(4)
pinned, other, event = host.pin_memory(), torch.cuda.Stream(), torch.cuda.Event()
event.record()

def in_a_capture(function):
    causes = []
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            try:
                function()
            except Exception as error:
                causes.append(error)
                raise
    except RuntimeError:
        raise causes[0]  # not that of the capture, which says only that one was before

def waiting_refused(function):
    torch.cuda.set_sync_debug_mode("error")
    function()

def on(stream, function):
    with torch.cuda.stream(stream):
        function()

def forked(function):
    import multiprocessing
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("exit status")

def backward():
    y = torch.ones(1, requires_grad=True)
    torch.autograd.grad(y * 2, y)
"""
# Each call in a fork of one process, in which the card may be used all the same.
TRY_EACH = """
import os, sys
from support.pretended_card import Host
for call in CALLS:
    if os.fork() == 0:
        Host.forked_after_use = False
        try:
            eval(call)
            said = "nothing"
        except Exception as error:
            said = str(error)
        print(call, said, sep=" | ", flush=True)
        os._exit(0)
    os.wait()
"""
REFUSED = {
    **{f"in_a_capture(lambda: {call})": "capturing" for call in (
        *("x[0].item()", "bool(x[0])", "float(x.sum())", "x.cpu()", "x.tolist()", "x.nonzero()", "torch.equal(x, x)"),
        *("torch.cuda.synchronize()", "event.synchronize()", "other.synchronize()", "torch.tensor(1, device='cuda')"),
        *("host.to('cuda')", "host.to('cuda', non_blocking=True)", "pinned.to('cuda')", "x.copy_(host)"),
        *("x.to('cpu', non_blocking=True)", "host.pin_memory()", "x[torch.tensor([0])]", "on(other, x.clone)"),
    )},
    **{f"waiting_refused(lambda: {call})": "synchronizing" for call in ("x.cpu()", "x[0].item()", "host.to(x)")},
    "x + host": "same device",
    "x + x.to('cuda:1')": "same device",
    "x.numpy()": "can't convert cuda:0",
    "forked(lambda: x.add_(1))": "exit status",
    "(backward(), forked(backward))": "exit status",
}  # fmt: skip
ALLOWED = (
    *("in_a_capture(lambda: x.add_(1))", "in_a_capture(x.clone)", "in_a_capture(lambda: x.copy_(pinned, True))"),
    *("in_a_capture(lambda: pinned.copy_(x, non_blocking=True))", "waiting_refused(x.clone)", "x + x[0].cpu()"),
    *("x.cpu().numpy()", "on(other, x.clone)", "forked(host.clone)", "forked(backward)"),
)


def start(tmp_path_factory, root, *command):
    folder = tmp_path_factory.mktemp("pretended")
    found = {"cwd": root, "env": environment(root, folder, "all"), "text": True, "capture_output": True}
    return subprocess.run([sys.executable, *command], **found)


def test_what_a_card_refuses(tmp_path_factory, root):
    calls = [*REFUSED, *ALLOWED]
    done = start(tmp_path_factory, root, "-c", f"CALLS = {calls}" + BEGIN + TRY_EACH)
    said = dict(line.split(" | ") for line in done.stdout.splitlines() if " | " in line)
    assert list(said) == calls, done.stderr
    assert [call for call, words in REFUSED.items() if words not in said[call]] == []
    assert {call: said[call] for call in ALLOWED} == dict.fromkeys(ALLOWED, "nothing")


@pytest.mark.slow
def test_the_tests_of_a_card(tmp_path_factory, root):
    options = ("-v", "-rs", "--tb=short", "-p", "no:cacheprovider", "--device", "cuda")
    done = start(tmp_path_factory, root, "-m", "pytest", *options, *FILES)
    counts, failed = outcomes(done.stdout)
    assert (failed, done.returncode) == ([], 0), done.stdout[-8000:] + done.stderr
    assert counts["passed"] > 200
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED [")]
    assert [line for line in skipped if not any(reason in line for reason in MAY_BE_SKIPPED)] == []
