"""The CUDA sources: what they include, that they compile, and what PTX and machine code the compiler made of them.

For two of the cards, one of each PTX that setup.py asks for; for all with DDPM_EXT_EVERY_CARD=1 in the environment.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from support.ptx import bodies

from benchmarks.static import cards
from benchmarks.static.compiler import EVERY_SOURCE, SOURCES, Build, Missing, build_all, find_tools, load_setup
from benchmarks.static.kernels import BOUND, CSRC, LOSS, STEP, TYPES, option_sets
from benchmarks.static.pipes import is_move
from benchmarks.static.report import Finding, findings
from benchmarks.static.sass import Instruction

ARCHS = cards.ARCHS if os.environ.get("DDPM_EXT_EVERY_CARD") else ["90", "100"]
STATISTICS = ("x_start_scale", "output_scale")  # which no path by element describes
BY_ELEMENT = [source for source in SOURCES if source not in STATISTICS]
EACH = pytest.mark.parametrize(("source", "arch"), [(source, arch) for arch in ARCHS for source in BY_ELEMENT])
EACH_DRAWING = pytest.mark.parametrize(
    ("source", "arch"), [(s, arch) for arch in ARCHS for s in (*BY_ELEMENT, "loss") if s != "randn"]
)
EACH_SOURCE = pytest.mark.parametrize(("source", "arch"), [(s, arch) for arch in ARCHS for s in EVERY_SOURCE])
EACH_SUM = pytest.mark.parametrize(("source", "arch"), [(s, arch) for arch in ARCHS for s in (*STATISTICS, "loss")])
EACH_LOSS = pytest.mark.parametrize(("source", "arch"), [("loss", arch) for arch in ARCHS])
EACH_RANDN = pytest.mark.parametrize(("source", "arch"), [("randn", arch) for arch in ARCHS])


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("folder", ["cuda", "core"])
def test_includes(folder):
    """What nvcc reads has no header of torch's, which would take it longer than the kernels; core has C's alone."""
    ours = {"cuda": r"core/|cuda/|call\.h|cuda_\w+\.h$|\w+$", "core": r"core/|(math|stdint|string)\.h$"}
    files = [path for path in (CSRC / folder).iterdir() if path.suffix in (".h", ".cuh", ".cu")]
    assert len(files) >= 3
    for path in files:
        for name in includes(path):
            assert re.match(ours[folder], name), f"{path.name} includes {name}"


# ------------------------------------------------------------------------------------------------- compile


@pytest.fixture(scope="module")
def builds() -> dict[tuple[str, str], Build]:
    try:
        tools = find_tools()
    except Missing as missing:
        pytest.skip(str(missing))
    archs = [arch for arch in tools.archs if arch in ARCHS]
    return {(build.source, build.arch): build for build in build_all(tools, EVERY_SOURCE, archs)}


@pytest.fixture
def build(builds, source, arch) -> Build:
    if (source, arch) not in builds:
        pytest.skip(f"this nvcc doesn't know sm_{arch}")
    return builds[source, arch]


@pytest.fixture
def kernels(build) -> list[Finding]:
    return findings([build])


@EACH
def test_compiles(build, kernels, arch):
    assert f".target sm_{max(of for of in load_setup().PTX_ARCHS if of <= int(arch))}" in build.ptx
    assert {kernel.name for kernel in build.kernels} == build.resources.keys() == bodies(build.ptx).keys()
    by_access = Counter(kernel.variant.access for kernel in kernels)
    of_step = kernels[0].variant.op == STEP
    assert by_access["vector"] == (1 + (len(option_sets()) if of_step else 0)) * by_access["strided"] > 0


def reads_before_a_barrier(ptx: str) -> list[str]:
    """The reads of one place in shared memory, which is the same for all threads, that come behind a store and before
    the next barrier. Threads would race for what such a place holds."""
    found, stored = [], False
    for line in ptx.splitlines():
        if ".entry" in line or "bar.sync" in line:
            stored = False
        elif re.search(r"\bst\.shared", line):
            stored = True
        elif stored and re.search(r"\bld\.shared\S*\s+[^\[]*\[_Z\w+(\+\d+)?\]", line):
            found.append(line.strip())
    return found


@EACH_SUM
def test_threads_read_what_is_everybodys_behind_a_barrier(build):
    assert "bar.sync" in build.ptx
    assert not reads_before_a_barrier(build.ptx)


@EACH
def test_no_library_headers_but_the_runtimes(build):
    """A toolkit without cuBLAS, cuSPARSE and the like is enough."""
    files = build.files
    assert any(f.endswith("core/philox.h") for f in files)
    heavy = re.compile(r"/(ATen|torch/csrc|caffe2)/|/(cublas|cusparse|cusolver|cufft|curand|cudnn)\w*\.h$")
    assert not [f for f in files if heavy.search(f)]


def floating_point(ptx: str) -> set[str]:
    """Its floating-point instructions, without the estimate that a square root starts from."""
    instructions = re.findall(r"^\s+(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*)", ptx, re.MULTILINE)
    assert len(instructions) > 1000
    return {i for i in instructions if re.search(r"\.(f32|f64|f16|bf16)", i)} - {"rsqrt.approx.ftz.f32"}


@EACH
def test_arithmetic_is_that_of_the_source(build):
    """Float32 operations rounded to nearest, none that ptxas could contract, flush or approximate, but for the one
    estimate that the square root starts from; no float64."""
    floating = floating_point(build.ptx)
    assert floating & {"fma.rn.f32", "fma.rn.f32x2"}
    bad = {i for i in floating if re.search(r"\.(ftz|approx|full|f64|sat)\b", i)}
    arithmetic = {
        i for i in floating if re.match(r"(add|sub|mul|mad|fma|div|rcp|sqrt|rsqrt|sin|cos|lg2|ex2|tanh)\.", i)
    }
    bad |= {i for i in arithmetic if not re.fullmatch(r"(add|sub|mul|fma)\.rn\.f32(x2)?", i)}
    assert not bad


def code(path: str, function: str = "") -> str:
    """A file of csrc without comments, or in it the body of a function."""
    text = re.sub(r"//.*", "", (CSRC / path).read_text())
    if not function:
        return text
    found = re.search(rf"\b{function}\([^)]*\) \{{(.*?)^\}}", text, re.DOTALL | re.MULTILINE)
    assert found, f"{path} has no {function}"
    return found[1]


def fma_calls(text: str) -> int:
    """Those that are written, and those of polynomials, one for each coefficient but the first."""
    polynomials = re.findall(r"\bpolynomial\(\w+, ([^)]*)\)", text)
    return len(re.findall(r"\bfma\(", text)) + sum(coefficients.count(",") for coefficients in polynomials)


def fma_a_root() -> int:
    """Written for every square root: in core/box_muller.h, and in cuda/pair.cuh for the square root itself."""
    normal, pair = code("core/box_muller.h"), code("cuda/pair.cuh")
    assert len(re.findall(r"\bsqrt\(", normal)) == 1
    return fma_calls(normal) + fma_calls(re.sub(r"\bF2 fma\(F2", "", pair))  # which defines fma as well


def fma_an_element(op: str, noise: str) -> int:
    """Written for every element, the noise aside."""
    if op == STEP:  # all of its options
        step = code("core/step_with_options.h").split("void take_step")[1]
        step += code("core/step_with_options.h", "learned_deviation")
        step += code("core/exponential.h", "exponential_parts") + code("core/exponential.h", "exponential")
        step += code("core/step.h", "guide") + 2 * code(
            "core/forward.h", "affine"
        )  # the clean sample, and what is known
        return fma_calls(step) + len(re.findall(r"\badd_(?:values|tensor)\b", step))
    mean = fma_calls(code("core/forward.h", "affine") + code("core/step.h", "step_mean"))
    drawn = {
        "ReverseStep": mean + fma_calls(code("core/step.h", "add_noise")),
        "Affine": fma_calls(code("core/forward.h", "affine")),
        "Randn": 0,
    }
    return drawn[op] if noise != "none" else {"ReverseStep": mean, "Affine": 0}[op]


# ------------------------------------------------------------------------------------------- machine code


def fused(instructions) -> int:
    """Fused multiply-adds among instructions, or in a Counter of them."""
    counts = Counter(instructions)
    return sum(times * {"FFMA": 1, "FFMA2": 2}.get(i.name, 0) for i, times in counts.items())


def roots(instructions) -> int:
    counts = Counter(instructions)
    return sum(times for i, times in counts.items() if i.opcode == "MUFU.RSQ")


def named(kernel: Finding) -> str:
    return f"{kernel.variant.title}, {kernel.variant.access}, {kernel.variant.dtypes}"


def offenders(kernels: list[Finding], wrong) -> dict[str, list[str]]:
    """By kernel the instructions that are wrong."""
    found = {named(k): sorted({f"{i.opcode} {i.operands}" for i in k.kernel.instructions if wrong(i)}) for k in kernels}
    return {name: instructions for name, instructions in found.items() if instructions}


@EACH_SOURCE
def test_nothing_spills(build, source):
    """No stack and no local memory; shared memory for sums alone, and for noise by strides. That of the loss holds the
    losses of 1 or 2 chunks in this turn and the last, or by pixels of 8 channels' chunks, the strands, and if a block
    is last; newer cards add 1 KiB."""
    for kernel in build.kernels:
        used = build.resources[kernel.name]
        assert not (used.stack or used.local or used.spill_stores or used.spill_loads), (kernel.name, used)
        assert not [i for i in kernel.instructions if i.name in ("LDL", "STL")], kernel.name
        if source == "loss":
            by_pixels = all(part in kernel.name for part in ("7LossRow", "5NoiseE2E", "6AccessE1E"))
            chunks = 8 if by_pixels else 4 if "6AccessE0E" in kernel.name else 2
            shared = chunks * 512 * 4 + 128 * 8 + 1 + by_pixels * 3072
            assert used.shared in (shared, shared + 1024), (kernel.name, used)
        elif source not in STATISTICS:
            draws = source == "step_with_options" or "5NoiseE2E" in kernel.name
            exchanges = draws and source != "randn" and "6AccessE1E" in kernel.name
            assert used.shared in ((6144, 6144 + 1024) if exchanges else (0,)), (kernel.name, used)


@EACH
def test_no_calls(kernels):
    """What the hardware lacks (division, a square root of subnormals) is called as a subroutine; a warp may wait so."""
    waits = [k for k in kernels if any("warpsync" in i.operands for i in k.kernel.instructions)]
    assert all(k.variant.access == "strided" and k.variant.noise != "none" for k in waits), list(map(named, waits))
    assert not offenders(waits, lambda i: i.calls and "warpsync" not in i.operands)
    assert not offenders([k for k in kernels if k not in waits], lambda i: i.calls or i.name == "RET")


@EACH
def test_no_arithmetic_but_float32(kernels):
    """No float64; half-precision instructions convert, or make constants; nothing flushes subnormals."""

    def wrong(i: Instruction) -> bool:
        half = i.name.startswith("H") and not is_move(i) and not (i.opcode == "HADD2.F32" and "-RZ" in i.operands)
        return half or ".FTZ" in i.opcode or ".F64" in i.opcode or bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)", i.name))

    assert not offenders(kernels, wrong)


@EACH
def test_nothing_is_approximate_but_the_start_of_a_root(kernels):
    """Nor is there a division of integers, which would start from a reciprocal."""
    assert not offenders(kernels, lambda i: i.name == "MUFU" and i.opcode != "MUFU.RSQ")
    for kernel in kernels:
        assert (roots(kernel.kernel.instructions) > 0) == (kernel.variant.noise == "drawn"), named(kernel)


@EACH_RANDN
def test_normals_contract_nothing(kernels):
    """As many fused multiply-adds beside each square root as the sources write."""
    randn = [kernel for kernel in kernels if kernel.variant.op == "Randn"]
    assert randn
    for kernel in randn:
        everything = kernel.kernel.instructions
        assert fused(everything) == roots(everything) * fma_a_root() > 0, named(kernel)


@EACH
def test_arithmetic_contracts_nothing(kernels):
    """As many fused multiply-adds for a vector as the sources write for its elements and their noise."""
    vector = [kernel for kernel in kernels if kernel.variant.access == "vector"]
    assert vector
    for kernel in vector:
        issued, v = kernel.path.issued(1), kernel.variant
        assert roots(issued) == (kernel.items // 2 if v.noise == "drawn" else 0), named(kernel)
        written = roots(issued) * fma_a_root() + kernel.items * fma_an_element(v.op, v.noise)
        if v.op == STEP and v.options != "all options":
            assert roots(issued) * fma_a_root() < fused(issued) <= written, named(kernel)
            continue
        # what an x_start stands in for is branched past, or done and not used; 1 - mask may become an addition
        spared = {0, kernel.items, 2 * kernel.items} if v.has_options else {0}
        assert written - fused(issued) in spared, (named(kernel), written, fused(issued))


def roots_before_use(way: list[Instruction], at: int) -> int:
    """Box-Muller's roots between a load and the first use of its values."""
    first = int(re.match(r"R(\d+)", way[at].operands)[1])
    values, met = {f"R{first + i}" for i in range(way[at].global_bits // 32)}, 0
    for i in way[at + 1 :]:
        if values & set(re.findall(r"\bR\d+", i.operands)):
            break
        met += i.opcode == "MUFU.RSQ"
    return met


@EACH_DRAWING
def test_noise_is_drawn_before_the_first_use_of_what_was_loaded(kernels):
    """In every turn, also where there is a single one, all or half of its noise, so that the loads are under way
    meanwhile. ptxas moves a use to in front of the noise, or a load to behind it, wherever it may."""
    drawing = [k for k in kernels if k.variant.access == "vector" and k.variant.noise == "drawn"]
    assert drawing
    for kernel in drawing:
        turn, roots_of_turn = kernel.path.turn, roots(kernel.path.turn)
        before = [i for i in kernel.path.once if i.address < turn[0].address]
        to = {(i.operands.split(",")[0], i.global_bits): i for i in turn if i.name == "LDG"}
        loads = [at for at, i in enumerate(turn) if i.name == "LDG"]
        assert len(to) == len(loads) and roots_of_turn > 0, named(kernel)
        if kernel.variant.op == STEP:  # a turn loads what it uses
            before, again = [], []
            assert max(loads) < min(at for at, i in enumerate(turn) if i.opcode == "MUFU.RSQ"), named(kernel)
        else:  # it loads for the next one, into the same registers as before the first
            again = [at for at, i in enumerate(before) if (i.operands.split(",")[0], i.global_bits) in to]
            assert len(again) >= len(loads), named(kernel)
        way = [*before, *turn, *turn]
        for at in [*again[-len(loads) :], *(len(before) + at for at in loads)]:
            assert roots_before_use(way, at) >= roots_of_turn / 2, (named(kernel), way[at].operands)


@EACH
def test_neighbours_are_loaded_before_the_first_is_stored(kernels):
    """By strides: four elements, and where tensors are optional two. By pixels a word, ahead of the noise."""
    for kernel in (k for k in kernels if k.variant.access == "strided"):
        count, reads = 2 if kernel.variant.has_options else 4, len(kernel.variant.tensors) - kernel.variant.written
        letters = {"LDG": "L", "STG": "S", "MUFU": "m", "STS": "s"}
        code = "".join(letters.get(i.name, "") for i in kernel.kernel.instructions)
        assert re.search(f"L{{{count * reads}}}S{{{count}}}", code.replace("m", "")), named(kernel)
        assert kernel.variant.noise != "drawn" or reads == 0 or re.search(f"L{{{reads}}}mmssss", code), named(kernel)


@EACH
def test_wide_loads_and_stores(kernels):
    """Of a vector all is stored by 128 bits, and every tensor is loaded so, or by 64 where a wider one is beside it,
    and nothing else is loaded for it. The model's next input has a dtype of its own."""
    vector = [kernel for kernel in kernels if kernel.variant.access == "vector"]
    assert vector
    for kernel in vector:
        assert kernel.path.loops, named(kernel)
        read = kernel.variant.tensors[: -kernel.variant.written]
        bits = [8 * kernel.items * TYPES[tensor][1] for tensor in kernel.variant.tensors]
        # Of four elements of 16 bits, which kernels with many tensors take at once, a word is the half.
        options = kernel.variant.options
        word = 64 if max(bits) == 64 and options in ("all options", "guided with x0", "next input") else 128
        parts = max(bits) // word
        loads = Counter(b // parts for b in bits[: len(read)] for _ in range(parts))
        assert kernel.widths("LDG") == loads, named(kernel)
        stored = {64, 128} if options in ("all options", "next input") else {word}
        assert kernel.widths("STG").keys() <= stored, named(kernel)


# ------------------------------------------------------------------------------------------------------- the loss
# Its kernels differ from the others by their sums in float64.


@EACH_LOSS
def test_every_loss(kernels):
    """Without the bound and with it, noise given or drawn, by vectors or strides, of five pairs of dtypes; and without
    the bound, drawn, by vectors with keys that are constants."""
    assert len(kernels) == len({named(kernel) for kernel in kernels}) == (2 * 2 * 2 + 1) * 5
    assert {kernel.variant.op for kernel in kernels} == {LOSS, BOUND}


@EACH_LOSS
def test_no_loss_calls(kernels):
    """But for CUDA's own shuffle, for a warp that has come apart, which older cards have as a subroutine, as they have
    the wait of a warp."""
    for kernel in kernels:
        most = 128 if kernel.variant.access != "vector" else 80 if kernel.variant.op == BOUND else 64
        assert kernel.resources.registers <= most, named(kernel)
        called = {i.operands for i in kernel.kernel.instructions if i.calls}
        assert all(re.search("shflsync_down|warpsync", operands) for operands in called), (named(kernel), called)
        assert called or not any(i.name == "RET" for i in kernel.kernel.instructions), named(kernel)


@EACH_LOSS
def test_arithmetic_of_a_loss(build, kernels):
    """Nothing approximate but the start of a root, nothing flushed; float64 is added, multiplied and converted."""
    floating = floating_point(build.ptx)
    assert not {i for i in floating if re.search(r"\.(ftz|approx|full|sat)\b", i)}
    double = {i for i in floating if ".f64" in i}
    allowed = r"(add|mul)(\.rn)?\.f64|cvt\.(f64\.f32|rn\.f32\.f64)|(ld|st)\.[\w.]+|mov\.f64|selp\.f64"
    assert double and not {i for i in double if not re.fullmatch(allowed, i)}
    assert not offenders(kernels, lambda i: i.name == "MUFU" and i.opcode != "MUFU.RSQ")


@EACH_LOSS
def test_wide_loads_and_stores_of_a_loss(kernels):
    """Of each tensor, in both of a turn's chunks: 128 bits of float32, 64 of 16 bits."""
    vector = [kernel for kernel in kernels if kernel.variant.access == "vector"]
    assert len(vector) == (2 * 2 + 1) * 5
    for kernel in vector:
        *read, slope = kernel.variant.tensors[: len(kernel.variant.tensors) - kernel.variant.written + 1]
        assert slope == "float"
        assert kernel.widths("LDG") == Counter(32 * TYPES[tensor][1] for tensor in read for _ in range(2)), named(
            kernel
        )
        assert kernel.widths("STG")[128] == 2 * kernel.variant.written, named(kernel)
