"""The functions of csrc/cuda/ptx.cuh, run as the PTX that nvcc makes of them, and in the PTX of the kernels that reduce
a sample the order in which blocks hand on their sums. On the stand-in for CUDA's runtime neither can be seen: it has
functions of its own for those of ptx.cuh, and its threads see at once what others wrote."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from support import ptx
from support.ptx import PtxError, run

from benchmarks.static.compiler import CSRC

each_arch = pytest.mark.parametrize("arch", ptx.ptx_archs())
LARGEST, LEAST_NORMAL, LEAST = np.array([0x7F7FFFFF, 0x00800000, 1], np.uint32).view(np.float32)
POSITIVE = [0.0, LEAST, 1e-40, LEAST_NORMAL, 0.5, 1.0, np.nextafter(np.float32(1), np.float32(2)), 3e5, LARGEST, np.inf]
SPECIAL = np.array([*POSITIVE, *(-x for x in POSITIVE), np.nan, -np.nan], np.float32)


@pytest.fixture
def trial(arch) -> str:
    return ptx.compile_ptx(ptx.TRIAL, arch)


def accesses(executed: dict[str, int]) -> dict[str, int]:
    return {opcode: count for opcode, count in executed.items() if opcode.startswith(("ld.global", "st."))}


def test_every_function_has_a_trial():
    functions = set(re.findall(r"__forceinline__ [\w*]+ (\w+)\(", (CSRC / "cuda/ptx.cuh").read_text()))
    assert len(functions) == 9
    assert functions == set(re.findall(r"cuda::(\w+)\(", ptx.TRIAL.read_text()))


# ------------------------------------------------------------------------------------------------- single instructions


@each_arch
def test_reciprocal_square_roots(trial):
    mantissas = np.linspace(1, 4, 500, endpoint=False, dtype=np.float32)
    x = np.concatenate([SPECIAL, mantissas, np.ldexp(mantissas[::9], np.arange(-126, 126, 4)[:56])])
    y = np.zeros_like(x)
    run(trial, "rsqrt_approx", len(x), x, y)
    zero = abs(x) < LEAST_NORMAL  # subnormals count as zeros of their sign
    assert np.array_equal(y[zero], np.copysign(np.float32(np.inf), x[zero]))
    assert np.isnan(y[(x < 0) & ~zero | np.isnan(x)]).all()
    assert y[x == np.inf].tobytes() == bytes(4)
    plain = (x >= LEAST_NORMAL) & (x < np.inf)
    assert plain.sum() > 550
    assert (abs(y[plain] * np.sqrt(x[plain].astype(np.float64)) - 1) <= 2**-22.9).all()


@each_arch
def test_larger_and_smaller_numbers(trial, arch):
    """-0 is below 0. NaN stays NaN, of any sign; before sm_80 that of the first number."""
    a, b = np.array(list(itertools.product(SPECIAL, repeat=2)), np.float32).T.copy()
    if int(arch) < 80:
        a, b = a[~np.isnan(b)], b[~np.isnan(b)]
    of_a = (a > b) | ((a == b) & ~np.signbit(a))
    for name, expected in (("max_nan", np.where(of_a, a, b)), ("min_nan", np.where(of_a, b, a))):
        c, nan = np.zeros_like(a), np.isnan(a) | np.isnan(b)
        run(trial, name, len(a), a, b, c)
        assert nan.any() and np.isnan(c[nan]).all()
        assert c[~nan].tobytes() == expected[~nan].tobytes()


@each_arch
def test_a_pointer_in_a_register_stays_one_to_global_memory(trial):
    to = np.zeros_like(SPECIAL)
    executed = run(trial, "in_register", len(SPECIAL), SPECIAL, to)
    assert to.tobytes() == SPECIAL.tobytes()
    assert accesses(executed) == {"ld.global.f32": len(to), "st.global.f32": len(to)}


@each_arch
@pytest.mark.parametrize(("bits", "of"), [(128, "v4.u32"), (64, "v2.u32"), (32, "u32")])
def test_words(trial, bits, of):
    """Each is moved whole, by one load and one store."""
    given = np.arange(7 * bits // 32, dtype=np.uint32).reshape(7, -1) + 0xFFFFFF00
    to = np.zeros_like(given)
    executed = run(trial, f"copy_{bits}", 7, given, to)
    assert np.array_equal(to, given)
    assert accesses(executed) == {f"ld.global.{of}": 7, f"st.global.{of}": 7}


@each_arch
@pytest.mark.parametrize(("bits", "of"), [(128, "v4.u32"), (64, "v2.u32")])
def test_words_under_a_condition(trial, bits, of):
    """Where it does not hold, memory is not read, which would be out of bounds, and the word stays."""
    given = np.arange(5 * bits // 32, dtype=np.uint32).reshape(5, -1) + 0xFFFFFF00
    condition = np.array([1, 0, 2**31, 1, 0, 0, 0], np.uint32)
    before = np.arange(7 * bits // 32, dtype=np.uint32).reshape(7, -1) + 1
    to = before.copy()
    executed = run(trial, f"load_{bits}_if", 7, condition, given, to)
    assert np.array_equal(to, np.where(condition[:, None] != 0, np.resize(given, to.shape), before))
    assert executed[f"ld.global.{of}"] == 7 + 3  # and those of `before`
    condition[-1] = 1
    with pytest.raises(PtxError, match=f"an access to {bits // 8} bytes at .*, out of bounds"):
        run(trial, f"load_{bits}_if", 7, condition, given, to)


@each_arch
def test_uses_stay_behind_noise(trial):
    """A thread ends there if its noise is NaN, and in no other case."""
    to = np.full_like(SPECIAL, 7)
    executed = run(trial, "keep_uses_behind", len(to), SPECIAL, to)
    nan = np.isnan(SPECIAL)
    assert executed["exit"] == nan.sum() == 2
    assert to[~nan].tobytes() == SPECIAL[~nan].tobytes() and (to[nan] == 7).all()


@each_arch
@pytest.mark.parametrize("bits", [32, 64])
def test_opaque_words(trial, bits):
    """The word is what it was, and the compiler has computed nothing with it beforehand."""
    to = np.zeros(3, f"u{bits // 8}")
    assert run(trial, f"opaque_{bits}", 3, to)[f"xor.b{bits}"] == 3
    assert to.tolist() == [5 ^ 3] * 3


REFUSED = {
    "mul.lo.s32 %r2, %r1, 2": "unknown instruction mul.lo.s32",
    "st.u32 [%rd1], %r1": "unknown instruction st.u32",
    "setp.lt.s32 %p1, %r1, 2": "unknown instruction setp.lt.s32",
    "ld.global.u32 %r2, [%rd1+8]": "an access to 4 bytes at 0x[0-9a-f]+, out of bounds",
    "ld.global.u32 %r2, [%rd1+-4]": "an access to 4 bytes at 0x[0-9a-f]+, out of bounds",
    "ld.global.u32 %r2, [%rd1+2]": "an access to 4 bytes at 0x[0-9a-f]+, not aligned",
    "ld.global.v2.u32 %r2, [%rd1]": "ld.global.v2.u32 of 1 registers",
    "ld.global.u64 %r2, [%rd1]": "%r2, of type b32, is an operand of type u64",
    "add.s32 %r2, %f1, 1": "%f1, of type f32, is an operand of type s32",
    "add.s32 %r2, %r3, 1": "%r3 is read and was never written",
    "xor.b32 %r2, %r1, %laneid": "%laneid, of type None, is an operand of type b32",
}


@pytest.mark.parametrize("instruction", REFUSED)
def test_the_interpreter_refuses(instruction):
    source = """.visible .entry kernel(.param .u64 at) { .reg .pred %p<2>; .reg .f32 %f<2>; .reg .b32 %r<4>;
    .reg .b64 %rd<2>; ld.param.u64 %rd1, [at]; ld.global.u32 %r1, [%rd1+4]; """
    memory = np.array([6, 7], np.uint32)
    run(source + "add.s32 %r2, %r1, -1; st.global.u32 [%rd1], %r2; ret; }", "kernel", 1, memory)
    assert memory.tolist() == [6, 7]
    with pytest.raises(PtxError, match=REFUSED[instruction]):
        run(f"{source} {instruction}; ret; }}", "kernel", 1, memory)


# ------------------------------------------------------------------------------------------- what blocks hand on

# Accesses to global memory: S stores, or adds by an atomic; T takes a number that tells whether the block is the last;
# V reads what no earlier read may stand in for, L any other. F is a fence for the whole device, B a barrier.
EVENTS = {
    "S": r"(?:st|red|atom)(?:\.\w+)*\.global\b(?!.*\.inc\.)",
    "T": r"atom(?:\.\w+)*\.global(?:\.\w+)*\.inc\.",
    "V": r"ld\.(?:volatile|relaxed|acquire)(?:\.\w+)*\.global\b",
    "L": r"ld\.global\b",
    "F": r"membar\.(?:gl|sys)|fence\.(?:acq_rel|sc)\.(?:gpu|sys)",
    "B": r"bar\.sync|barrier\.sync",
}
# What a block stores is fenced before it counts itself, and what it reads of others comes behind a second fence.
ONCE = "[^TFVL]*S[^TFVL]*BFTFB[^TFL]*V[^TFL]*"
HANDED_ON = re.compile(f"[^TFV]*{ONCE.removeprefix('[^TFVL]*')}(?:{ONCE})?")


def events(body: str) -> str:
    """A kernel's, in the order of its instructions. Those of assembly in braces, which stay in place, are left out."""
    each = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in EVENTS.items()))
    lines = (re.sub(r"^\s*(?:@!?%\w+\s+)?", "", line) for line in body.splitlines())
    return "".join(found.lastgroup for found in map(each.match, lines) if found)


@pytest.mark.parametrize(("source", "kernels"), [("loss", 5 * 9), ("output_scale", 6), ("x_start_scale", 11)])
def test_blocks_see_what_the_others_wrote(source, kernels):
    """The stores, a fence, the count of blocks, a fence, and reads of the memory itself, in this order."""
    found = {name: events(body) for name, body in ptx.bodies(ptx.kernels_of(source)).items()}
    wrong = {name: order for name, order in found.items() if not HANDED_ON.fullmatch(order)}
    assert not wrong
    assert len(found) == kernels
    assert all(order.count("T") == (2 if source == "loss" else 1) for order in found.values())


def test_counts_are_added_by_atomics():
    """In shared memory those of the four magnitudes that a thread computes, and of the sixteen that it loads. In global
    memory those of a block."""
    bodies = ptx.bodies(ptx.kernels_of("x_start_scale"))
    assert len(bodies) == 11
    for name, body in bodies.items():
        computes = 4 if "threshold_samples" in name else 0
        assert len(re.findall(r"\batom\.shared\.add\.u32\s.*, 1;", body)) == computes + 16, name
        assert re.search(r"\batom\.global\.add\.u32\s", body), name
