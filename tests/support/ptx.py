"""Compiles CUDA sources to PTX, and interprets kernels in PTX, one thread after the other, on numpy arrays.

The interpreter knows the instructions of the kernels in ptx_trial.cu, as NVIDIA's PTX ISA defines them. For another
instruction it raises PtxError with the instruction's name. It also raises PtxError for memory accesses that are
unaligned or not within one array.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks.static.compiler import CSRC, Missing, find_tools, load_setup, output

ROOT = Path(__file__).resolve().parents[2]
TRIAL = ROOT / "tests/support/ptx_trial.cu"
NAN = 0x7FFFFFFF  # the bits of the only NaN that arithmetic on float32 returns
FIRST_ADDRESS, BETWEEN = 2**33, 2**20  # the address of the first array; the distance from one array to the next


class PtxError(Exception):
    """Says that the interpreter does not accept an instruction, an operand or a memory access."""


# --------------------------------------------------------------------------------------------------------- the compiler


@functools.cache
def compile_ptx(source: Path, arch: str) -> str:
    """The PTX of a source, compiled with the flags of the build. Skips the test if no nvcc knows the architecture."""
    try:
        tools = find_tools()
    except Missing as missing:
        pytest.skip(str(missing))
    if f"compute_{arch}" not in output(tools.nvcc, "--list-gpu-arch").split():
        pytest.skip(f"this nvcc doesn't know compute_{arch}")
    flags = [flag for flag in tools.flags[tools.archs[0]] if not flag.startswith("-gencode")]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.ptx"
        output(tools.nvcc, *flags, f"-arch=compute_{arch}", "-ptx", "-o", target, source)
        return target.read_text()


def kernels_of(source: str) -> str:
    """The PTX of a source in csrc/cuda, for the architecture 8.0."""
    return compile_ptx(CSRC / "cuda" / f"{source}.cu", "80")


def ptx_archs() -> list[str]:
    """The architectures for which the build makes PTX."""
    return [str(arch) for arch in load_setup().PTX_ARCHS]


def bodies(ptx: str) -> dict[str, str]:
    """The PTX of each kernel, its parameters and instructions, by the kernel's name."""
    parts = re.split(r"^\s*(?:\.visible\s+|\.weak\s+)?\.entry\s+(\w+)", ptx, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ------------------------------------------------------------------------------------------------------------- a kernel


class Instruction(NamedTuple):
    """An instruction of PTX.

    guard: the predicate that must be true for the instruction to execute, or false if it begins with "!". "" if there
        is no condition.
    """

    guard: str
    opcode: str
    operands: list[str]


class Kernel(NamedTuple):
    parameters: list[str]
    registers: dict[str, str]  # their types by name; "%r%" stands for the registers %r0, %r1, ...
    instructions: list[Instruction]
    labels: dict[str, int]  # the index of the instruction after each label


def parse(body: str) -> Kernel:
    """Parses the PTX of a kernel (`bodies`)."""
    head, _, body = re.sub(r"//.*", "", body).partition("{")
    kernel = Kernel(re.findall(r"\.param\s+\.u64\s[^,)]*?(\w+)\s*[,)]", head), {}, [], {})
    for statement in body.split(";"):
        text = statement.lstrip("{} \t\n").rstrip()  # braces before a statement open or close a scope
        while found := re.match(r"(\$?\w+):\s*", text):
            kernel.labels[found[1]] = len(kernel.instructions)
            text = text[found.end() :]
        if found := re.fullmatch(r"\.reg\s+\.(\w+)\s+([%\w]+)(<\d+>)?", text):
            kernel.registers[found[2] + "%" * bool(found[3])] = found[1]
        elif found := re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.]*)\s*(.*)", text, re.DOTALL):
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", found[3])
            kernel.instructions.append(Instruction(found[1] or "", found[2], operands))
        elif text:
            raise PtxError(f"unknown statement {text!r}")
    return kernel


# ------------------------------------------------------------------------------------------------------------ the state


class Memory:
    """The arrays that a kernel accesses. Their addresses are far apart, so an access out of bounds is in no array."""

    def __init__(self, arrays: tuple[np.ndarray, ...]) -> None:
        self.bytes = [memoryview(array.reshape(-1)).cast("B") for array in arrays]

    def at(self, address: int, size: int) -> memoryview:
        """The `size` bytes at an address. Raises PtxError if they are out of bounds or unaligned."""
        number, begin = divmod(address - FIRST_ADDRESS, BETWEEN)
        if not (0 <= number < len(self.bytes) and begin + size <= len(self.bytes[number])):
            raise PtxError(f"an access to {size} bytes at {address:#x}, out of bounds")
        if address % size:
            raise PtxError(f"an access to {size} bytes at {address:#x}, not aligned")
        return self.bytes[number][begin : begin + size]


class Thread:
    """The registers of a thread. Their bits are stored as integers."""

    def __init__(self, kernel: Kernel, number: int) -> None:
        self.kernel, self.number = kernel, number
        self.values: dict[str, int] = {}

    def check(self, register: str, kind: str) -> None:
        """Raises PtxError unless an operand of the type `kind`, such as "f32", may be this register."""
        types = self.kernel.registers
        declared = types.get(register) or types.get(re.sub(r"\d+$", "%", register))
        if (
            declared is None
            or declared[1:] != kind[1:]
            or (declared != kind and {declared[0], kind[0]} in ({"f", "u"}, {"f", "s"}))
        ):
            raise PtxError(f"{register}, of type {declared}, is an operand of type {kind}")

    def read(self, operand: str, kind: str) -> int:
        if re.fullmatch(r"-?\d+", operand):
            return int(operand) % 2 ** int(kind[1:])
        if operand == "%tid.x":
            return self.number
        self.check(operand, kind)
        if operand not in self.values:
            raise PtxError(f"{operand} is read and was never written")
        return self.values[operand]

    def write(self, register: str, kind: str, value: int) -> None:
        self.check(register, kind)
        self.values[register] = value if kind == "pred" else value % 2 ** int(kind[1:])

    def address(self, operand: str) -> int:
        found = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", operand)
        if found is None:
            raise PtxError(f"unknown address {operand}")
        return self.read(found[1], "b64") + int(found[2] or 0)


# ----------------------------------------------------------------------------------------------------------- arithmetic


def to_float(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def to_bits(value: np.float32) -> int:
    return NAN if np.isnan(value) else int(np.float32(value).view(np.uint32))


def rsqrt(x: np.float32, flushes: bool) -> np.float32:
    """1/sqrt(x), rounded to nearest, so within the error that the ISA allows. flushes: whether subnormals are 0."""
    if flushes and abs(x) < np.finfo(np.float32).smallest_normal:
        x = np.copysign(np.float32(0), x)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.copysign(np.float32(np.inf), x) if x == 0 else np.float32(1 / np.sqrt(np.float64(x)))


def larger(a: np.float32, b: np.float32, keeps_nan: bool) -> np.float32:
    """The larger number, where 0 is larger than -0. If one number is NaN: NaN if keeps_nan, else the other number."""
    if np.isnan(a) or np.isnan(b):
        return np.float32(np.nan) if keeps_nan else b if np.isnan(a) else a
    return max((a, b), key=lambda x: (x, not np.signbit(x)))


def compare(comparison: str, kind: str, a: int, b: int) -> bool:
    if comparison == "ne" and kind[0] in "bus":
        return a != b
    if comparison == "nan" and kind == "f32":
        return bool(np.isnan(to_float(a)) or np.isnan(to_float(b)))
    raise PtxError(f"unknown instruction setp.{comparison}.{kind}")


# ------------------------------------------------------------------------------------------------------------ execution


def execute(thread: Thread, memory: Memory, opcode: str, operands: list[str]) -> None:
    """Executes an instruction other than a branch, ret or exit."""
    to, *of = operands
    match opcode.split("."):
        case ["ld", "param", kind]:
            number = thread.kernel.parameters.index(of[0].strip("[]"))
            thread.write(to, kind, FIRST_ADDRESS + number * BETWEEN)
        case ["ld" | "st" as way, "global", *vector, kind] if vector in ([], ["v2"], ["v4"]):
            registers, place = (to, of[0]) if way == "ld" else (of[0], to)
            size, names = int(kind[1:]) // 8, re.findall(r"[%\w]+", registers)
            if len(names) != int(vector[0][1:] if vector else 1):
                raise PtxError(f"{opcode} of {len(names)} registers")
            word = memory.at(thread.address(place), size * len(names))
            for i, name in enumerate(names):
                part = word[i * size : (i + 1) * size]
                if way == "ld":
                    thread.write(name, kind, int.from_bytes(part, "little"))
                else:
                    part[:] = thread.read(name, kind).to_bytes(size, "little")
        case ["mov", kind]:
            thread.write(to, kind, thread.read(of[0], kind))
        case ["cvta", "to", "global", kind]:  # in this interpreter, a global address is its generic address
            thread.write(to, kind, thread.read(of[0], kind))
        case ["cvt", "u64", "u32"]:
            thread.write(to, "u64", thread.read(of[0], "u32"))
        case ["mul", "wide", "u32"]:
            thread.write(to, "u64", thread.read(of[0], "u32") * thread.read(of[1], "u32"))
        case ["add" | "xor" as name, "s32" | "s64" | "b32" | "b64" as kind] if (name == "xor") == (kind[0] == "b"):
            a, b = thread.read(of[0], kind), thread.read(of[1], kind)
            thread.write(to, kind, a + b if name == "add" else a ^ b)
        case ["shl", "b64"]:
            thread.write(to, "b64", thread.read(of[0], "b64") << min(thread.read(of[1], "b32"), 64))
        case ["setp", comparison, kind]:
            thread.write(to, "pred", compare(comparison, kind, thread.read(of[0], kind), thread.read(of[1], kind)))
        case ["selp", kind]:
            thread.write(to, kind, thread.read(of[0 if thread.read(of[2], "pred") else 1], kind))
        case ["rsqrt", "approx", *ftz, "f32"] if ftz in ([], ["ftz"]):
            thread.write(to, "f32", to_bits(rsqrt(to_float(thread.read(of[0], "f32")), bool(ftz))))
        case ["max" | "min" as name, *nan, "f32"] if nan in ([], ["NaN"]):
            a, b = (to_float(thread.read(operand, "f32")) for operand in of)
            thread.write(to, "f32", to_bits(larger(a, b, bool(nan)) if name == "max" else -larger(-a, -b, bool(nan))))
        case _:
            raise PtxError(f"unknown instruction {opcode}")


def run(ptx: str, name: str, threads: int, *arrays: np.ndarray) -> Counter[str]:
    """Runs one block of a kernel, whose parameters are the arrays. Returns how often each instruction was executed."""
    kernel, memory, executed = parse(bodies(ptx)[name]), Memory(arrays), Counter()
    if len(kernel.parameters) != len(arrays):
        raise PtxError(f"{len(arrays)} arrays for {len(kernel.parameters)} parameters")
    for number in range(threads):
        thread, at = Thread(kernel, number), 0
        while True:
            guard, opcode, operands = kernel.instructions[at]
            at += 1
            if guard and thread.read(guard.strip("!"), "pred") == guard.startswith("!"):
                continue
            executed[opcode] += 1
            if opcode in ("ret", "exit"):
                break
            if opcode.split(".")[0] == "bra":
                at = kernel.labels[operands[0]]
            else:
                execute(thread, memory, opcode, operands)
    return executed
