"""csrc/cuda/loss.cu as machine code: see test_cuda_sources.py, of whose kernels it differs by its sums in float64."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # pytest without python -m leaves it out

from benchmarks.static.cards import ARCHS
from benchmarks.static.compiler import Build, Missing, build_all, find_tools

# a chunk's losses, the strands, and whether a block is the last; from sm_90 on with 1 KiB that CUDA keeps for itself
SHARED = 512 * 4 + 128 * 8 + 1


@pytest.fixture(scope="module")
def builds() -> dict[str, Build]:
    try:
        tools = find_tools()
    except Missing as missing:
        pytest.skip(str(missing))
    return {build.arch: build for build in build_all(tools, ["loss"], tools.archs)}


@pytest.fixture(params=ARCHS)
def build(builds, request) -> Build:
    if request.param not in builds:
        pytest.skip(f"this nvcc doesn't know sm_{request.param}")
    return builds[request.param]


def test_every_variant(build):
    """Noise given or drawn, by vectors or strides, of five pairs of dtypes."""
    assert len(build.kernels) == 2 * 2 * 5
    assert all("loss_of_samples" in kernel.name for kernel in build.kernels)


def test_next_to_nothing_spills(build):
    """Some versions of ptxas keep two words of two variants on the stack."""
    stacks = []
    for kernel in build.kernels:
        used = build.resources[kernel.name]
        assert used.registers <= 64, kernel.name
        assert used.shared in (SHARED, SHARED + 1024), (kernel.name, used)
        assert used.stack <= 8 and used.local == 0, (kernel.name, used)
        stacks.append(used.stack)
    assert sum(stack > 0 for stack in stacks) <= 2


def test_arithmetic(build):
    """Nothing approximate but the start of a root, nothing flushed; float64 is added, multiplied and converted."""
    instructions = re.findall(r"^\s+(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*)", build.ptx, re.MULTILINE)
    floating = {i for i in instructions if re.search(r"\.(f32|f64|f16|bf16)", i)} - {"rsqrt.approx.ftz.f32"}
    assert not {i for i in floating if re.search(r"\.(ftz|approx|full|sat)\b", i)}
    double = {i for i in floating if ".f64" in i}
    allowed = r"(add|mul)(\.rn)?\.f64|cvt\.(f64\.f32|rn\.f32\.f64)|(ld|st)\.[\w.]+|mov\.f64|selp\.f64"
    assert double and not {i for i in double if not re.fullmatch(allowed, i)}
    assert not {i.opcode for kernel in build.kernels for i in kernel.instructions if i.name == "MUFU"} - {"MUFU.RSQ"}


def test_vectors_are_loaded_and_stored_whole(build):
    """A model's output of 16 bits beside float32 is 64 bits of a chunk's part."""
    for kernel in build.kernels:
        widths = {i.opcode for i in kernel.instructions if i.name in ("LDG", "STG")}
        assert any(".128" in w or ".64" in w for w in widths), kernel.name
