"""The CUDA driver is left alone until somebody asks for a GPU: a process that has sampled on the CPU can be forked,
and its children can train."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.subprocess,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc"),
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA and has no driver to ask"),
]
# In the place of three functions of the CUDA runtime. It claims one GPU, and counts the calls in a file.
LIBRARY = """
#include <stdio.h>
#include <stdlib.h>
static void note(void) { FILE* f = fopen(getenv("CALLS"), "a"); fputc('x', f); fclose(f); }
int cudaGetDeviceCount(int* count) { note(); *count = 1; return 0; }
int cudaSetDevice(int device) { note(); return device != 0; }
int cudaGetDevice(int* device) { note(); *device = 0; return 0; }
"""
SAMPLE = """
import torch
import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox
gd, x = GaussianDiffusion(100), torch.zeros(2, 3, 4, 4)
gd.p_sample(lambda x, t: x, x, 3, rng=Philox(0))
gd.q_sample(x, 3, rng=Philox(0))
gd.sample(lambda x, t: x, 4, batch_size=2, sampler="unipc", steps=3, record="last", progress=False)
gd.train_losses(lambda x, t: x, x, torch.tensor([1, 2]))
"""
TRAIN = """
import os
child = os.fork()
if not child:
    weight = torch.ones((), requires_grad=True)
    gd.train_losses(lambda x, t: weight * x, torch.randn(2, 3, 4, 4), torch.tensor([1, 2])).backward()
    os._exit(0 if weight.grad > 0 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("driver") / "counts.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=LIBRARY, text=True, check=True)
    return path


def calls(library, code):
    """How often the driver was asked. It is asked where there is a GPU for a backward pass, which is no fault."""
    found = library.with_suffix(".calls")
    found.write_text("")
    environment = os.environ | {"LD_PRELOAD": str(library), "CALLS": str(found)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return len(found.read_text())


def test_sampling_on_the_cpu_asks_the_driver_nothing(library):
    assert calls(library, SAMPLE) == 0
    assert calls(
        library, "import torch; torch.cuda.device_count(); torch.zeros(1, requires_grad=True).sum().backward()"
    )


def test_a_fork_can_train(library):
    """Autograd's threads, of which there is one for each GPU, must not have begun before."""
    assert calls(library, SAMPLE + TRAIN) > 0
