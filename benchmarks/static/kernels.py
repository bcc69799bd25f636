"""Identifies a kernel by its template's arguments and counts the bytes that it moves for one element."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[2] / "csrc"
STEP, LOSS, BOUND = "step_with_options", "Loss", "Loss with bound"
TYPES = {"float": ("float32", 4), "__half": ("float16", 2), "__nv_bfloat16": ("bfloat16", 2)}


class Variant(NamedTuple):
    """One instance of a kernel template: `elementwise` in csrc/cuda/elementwise.cuh, `with_options` in
    step_with_options.cu, or `loss_of_samples` in loss.cu."""

    op: str
    noise: str  # one of the Noise enum: none, given, drawn
    access: str  # one of the Access enum: vector, strided
    device_seed: bool
    tensors: tuple[str, ...]  # C++ types of the tensors that it reads and then of those that it writes
    written: int = 1
    options: str = "all options"  # of step_with_options: those that the kernel may have, all of which are counted

    @property
    def has_options(self) -> bool:
        """Whether its tensors are known only when it runs. Here all of them are counted, and its noise is drawn."""
        return self.op in (STEP, LOSS, BOUND)

    @property
    def adds_up(self) -> bool:
        """Whether a block adds up its threads' values, so that its first warp does more than the others."""
        return self.op in (LOSS, BOUND)

    @property
    def title(self) -> str:
        if self.op == STEP:
            return f"{self.op}, {self.options}"
        noise = "" if self.noise == "none" else f", noise {self.noise}"
        return f"{self.op}{noise}{', device seed' if self.device_seed else ''}"

    @property
    def dtypes(self) -> str:
        """The dtypes of x, the second tensor and given noise, as far as it reads them; one name if all are the same."""
        names = [TYPES[t][0] for t in self.tensors]
        read = names[: -self.written] or names
        if self.op == STEP:
            return " / ".join(dict.fromkeys(names))
        return read[0] if len(set(read)) == 1 else " / ".join(read)

    @property
    def bytes_an_element(self) -> int:
        return sum(TYPES[t][1] for t in self.tensors)

    @property
    def bytes_read(self) -> int:
        return self.bytes_an_element - self.bytes_written

    @property
    def bytes_written(self) -> int:
        return sum(TYPES[t][1] for t in self.tensors[-self.written :])


def text_of(pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(CSRC.glob(pattern)))


@cache
def enum(name: str) -> list[str]:
    """The enumerators of an enum class in csrc."""
    found = re.search(rf"enum class {name}\b[^{{]*\{{([^}}]*)\}}", text_of("**/*.h") + text_of("**/*.cuh"))
    if found is None:
        raise ValueError(f"csrc has no enum class {name}")
    return [word.strip() for word in found[1].split(",") if word.strip()]


@cache
def options(kind: str) -> list[str]:
    """The step's optional arguments that are of one kind: LIKE_X, OF_MODEL, PER_SAMPLE, FLAG or RESULT."""
    declared = text_of("core/step_inputs.def").split("// clang-format off")[1].split("// clang-format on")[0]
    return re.findall(rf"^  {kind}\((\w+)", declared, re.MULTILINE)


@cache
def structs_of_options() -> dict[str, str]:
    """In C++, of each set of the step's options that has kernels of its own."""
    text = text_of("cuda/option_sets.cuh")
    return dict(re.findall(r"^struct (\w+) : AnyOptions \{\n(.*?)^\};", text, re.DOTALL | re.MULTILINE))


@cache
def option_sets() -> dict[str, frozenset[str]]:
    """The sets of the step's options that have kernels of their own: all that a call of one may have."""
    found = re.search(r"\bkAlways = (.*?);", text_of("cuda/option_sets.cuh"))
    if found is None:
        raise ValueError("csrc/cuda/option_sets.cuh has no kAlways")
    sets = {"kAlways": members(found[1], {})}
    for name, body in structs_of_options().items():
        for constant, value in re.findall(r"\b(kMust|kMay) = (.*?);", body, re.DOTALL):
            sets[constant] = sets[f"{name}::{constant}"] = members(value, sets)
    return {name: frozenset(sets[f"{name}::kMay"]) for name in structs_of_options()}


def members(value: str, sets: dict[str, set[str]]) -> set[str]:
    """What a set's C++ expression has: tensors and factors by name, and all of other sets."""
    others = (sets[name] for name in re.findall(r"(?:\w+::)?\bk[A-Z]\w+", value))
    return {*re.findall(r"(?:Role|Result|Factor)::(\w+)", value)}.union(*others)


def in_words(name: str) -> str:
    """LearnedVariance: learned variance."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", name).lower()


@cache
def reads(op: str) -> tuple[bool, bool]:
    """Whether an operator reads x, and a second tensor besides the noise."""
    found = re.search(rf"struct {op} \{{.*?kX = (\w+), kSecond = (\w+)", text_of("cuda/*.cu*"), re.DOTALL)
    if found is None:
        raise ValueError(f"csrc/cuda has no struct {op} with kX and kSecond")
    return found[1] == "true", found[2] == "true"


@cache
def max_turns() -> int:
    """How many vectors a thread takes at most, by the launch's constant; 1 if there is no constant."""
    found = re.search(r"\bkMaxTurns = (\d+)", text_of("cuda/*.cuh"))
    return int(found[1]) if found else 1


@cache
def share_that_adds_up() -> float:
    """The share of a block's warps that add up a turn's losses: one for each chunk, of which a thread takes four
    elements."""
    chunk = re.search(r"\bkLossChunk = (\d+)", text_of("core/loss.h"))
    parts = re.search(r"\bkParts = kAccess == Access::vector \? (\d+)", text_of("cuda/loss.cu"))
    if chunk is None or parts is None:
        raise ValueError("csrc has no kLossChunk, or its loss.cu no kParts")
    return int(parts[1]) / (int(chunk[1]) // (4 * 32))


def demangler() -> str | None:
    return shutil.which("c++filt") or shutil.which("cu++filt")


def demangle(names: Iterable[str]) -> list[str]:
    done = subprocess.run([str(demangler())], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def variant(demangled: str) -> Variant:
    """Finds the variant of a kernel from its name as c++filt prints it."""
    found = re.search(r"\b(elementwise|with_options|loss_of_samples)<(.*?)>\(", demangled)
    if found is None:
        raise ValueError(f"not an instance of elementwise, with_options or loss_of_samples: {demangled}")
    arguments = [argument.strip() for argument in found[2].replace("(anonymous namespace)", "").split(",")]
    values = {}
    for argument in arguments:
        if enumerator := re.fullmatch(r"\((?:\w+::)*(\w+)\)(\d+)", argument):
            values[enumerator[1]] = enum(enumerator[1])[int(enumerator[2])]
    if found[1] == "with_options":
        x, model = [argument for argument in arguments if argument in TYPES]
        # x_t and the noise, the model's output, and the next sample are no options
        like_x, of_model = ["x_t", "noise", *options("LIKE_X")], ["model_output", *options("OF_MODEL")]
        results, title = ["out", *options("RESULT")], "all options"
        if (name := arguments[1].split("::")[-1]) in (sets := option_sets()):
            like_x, of_model, results = ([n for n in names if n in sets[name]] for names in (like_x, of_model, results))
            title = in_words(name)
        tensors = (*[x] * len(like_x), *[model] * len(of_model), *[x] * len(results))
        return Variant(STEP, "drawn", values["Access"], False, tensors, len(results), title)
    given = values["Noise"] == "given"
    if found[1] == "loss_of_samples":
        x, model = [argument for argument in arguments if argument in TYPES]
        # with the bound, half of the model's output is for the variance; slopes are float32
        op, halves = (BOUND, 2) if arguments[0].endswith("VariationalRow") else (LOSS, 1)
        tensors = (x, *[model] * halves, *[x] * given, *["float"] * halves)
        # Only the variant by vectors, without the bound, is made again for a seed that is not in memory.
        plain = values["Noise"] == "drawn" and values["Access"] == "vector" and op == LOSS
        by_memory = plain and "false" in arguments
        return Variant(op, values["Noise"], values["Access"], by_memory, tensors, halves)
    op = arguments[0].split("::")[-1]
    x, second, noise = [argument for argument in arguments if argument in TYPES]
    reads_x, reads_second = reads(op)
    tensors = (*[x] * reads_x, *[second] * reads_second, *[noise] * given, x)
    return Variant(op, values["Noise"], values["Access"], "true" in arguments, tensors)
