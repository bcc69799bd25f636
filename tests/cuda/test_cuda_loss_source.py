"""csrc/cuda/loss.cu as machine code: see test_cuda_sources.py, of whose kernels it differs by its sums in float64."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from support.ptx import reads_before_a_barrier

from benchmarks.static.cards import ARCHS
from benchmarks.static.compiler import Build, Missing, build_all, find_tools
from benchmarks.static.kernels import TYPES, enum
from benchmarks.static.report import findings

# the losses of one or two chunks in this turn and the last one, the strands, and whether a block is the last; CUDA
# keeps 1 KiB for itself on newer cards
SHARED = {chunks: 2 * chunks * 512 * 4 + 128 * 8 + 1 for chunks in (1, 2)}
BITS = {"f": 32, "6__half": 16, "13__nv_bfloat16": 16}


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


def variants(build: Build) -> dict[tuple[str, str, str, bool, str, str], object]:
    """Kernels by (row, noise, access, whether keys are constants, type of x_start, type of the model's output)."""
    found = {}
    for kernel in build.kernels:
        types = "|".join(BITS)
        name = re.search(
            rf"loss_of_samplesINS_\d+(\w+?)ELNS_5NoiseE(\d)ELNS0_6AccessE(\d)ELb(\d)E({types})({types}|S\d_)EEv",
            kernel.name,
        )
        assert name is not None, kernel.name
        x, m = name[5], name[5] if name[6].startswith("S") else name[6]
        found[name[1], enum("Noise")[int(name[2])], enum("Access")[int(name[3])], name[4] == "1", x, m] = kernel
    return found


def test_every_variant(build):
    """Without the bound and with it, noise given or drawn, by vectors or strides, of five pairs of dtypes; and without
    the bound, drawn, by vectors with keys that are constants."""
    assert len(variants(build)) == len(build.kernels) == (2 * 2 * 2 + 1) * 5
    assert {row for row, *_ in variants(build)} == {"LossRow", "VariationalRow"}


def test_nothing_spills_or_is_called(build):
    """But for CUDA's own shuffle, for a warp that has come apart, which older cards have as a subroutine."""
    for kernel in build.kernels:
        used = build.resources[kernel.name]
        vector = "6AccessE0E" in kernel.name
        most = 128 if not vector else 80 if "VariationalRow" in kernel.name else 64
        assert used.registers <= most, (kernel.name, used)
        shared = SHARED[2 if vector else 1]
        assert used.shared in (shared, shared + 1024), (kernel.name, used)
        assert not (used.stack or used.local or used.spill_stores or used.spill_loads), (kernel.name, used)
        assert not {i.opcode for i in kernel.instructions if i.name in ("LDL", "STL")}, kernel.name
        called = {i.operands for i in kernel.instructions if i.calls}
        assert all("shflsync_down" in operands for operands in called), (kernel.name, called)
        if not called:
            assert not {i.opcode for i in kernel.instructions if i.name == "RET"}, kernel.name


def test_arithmetic(build):
    """Nothing approximate but the start of a root, nothing flushed; float64 is added, multiplied and converted."""
    instructions = re.findall(r"^\s+(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*)", build.ptx, re.MULTILINE)
    floating = {i for i in instructions if re.search(r"\.(f32|f64|f16|bf16)", i)} - {"rsqrt.approx.ftz.f32"}
    assert not {i for i in floating if re.search(r"\.(ftz|approx|full|sat)\b", i)}
    double = {i for i in floating if ".f64" in i}
    allowed = r"(add|mul)(\.rn)?\.f64|cvt\.(f64\.f32|rn\.f32\.f64)|(ld|st)\.[\w.]+|mov\.f64|selp\.f64"
    assert double and not {i for i in double if not re.fullmatch(allowed, i)}
    assert not {i.opcode for kernel in build.kernels for i in kernel.instructions if i.name == "MUFU"} - {"MUFU.RSQ"}


def test_threads_read_what_is_everybodys_behind_a_barrier(build):
    assert "bar.sync" in build.ptx
    assert not reads_before_a_barrier(build.ptx)


def test_elements_are_wide_loads_and_stores(build):
    """Of each tensor, in both of a turn's chunks: 128 bits of float32, 64 of 16 bits."""
    vector = [finding for finding in findings([build]) if finding.variant.access == "vector"]
    assert len(vector) == (2 * 2 + 1) * 5
    for finding in vector:
        *read, slope = finding.variant.tensors[: len(finding.variant.tensors) - finding.variant.written + 1]
        assert slope == "float"
        expected = Counter(32 * TYPES[tensor][1] for tensor in read for _ in range(2))
        assert finding.widths("LDG") == expected, finding.kernel.name
        assert finding.widths("STG")[128] == 2 * finding.variant.written, finding.kernel.name
