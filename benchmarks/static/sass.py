"""Reads what nvdisasm prints: kernels, their instructions, and which may follow which."""

from __future__ import annotations

import re
from typing import NamedTuple

SECTION = re.compile(r"^\.text\.(\S+):$")
LABEL = re.compile(r"^([.$\w]+):$")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*?)\s*;")
TARGET = re.compile(r"`\(([^)\s]+)\)")
WIDTH = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
# Control goes elsewhere than to a label in the text.
UNREADABLE = {"BRX", "BRXU", "JMX", "JMXU", "JMP", "CALL.ABS", "BREAK", "KILL"}


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate it is under, as "P0" or "!P0"; often none
    opcode: str  # with its modifiers, as "IMAD.WIDE.U32"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str:
        """The label that a branch or a call names."""
        found = TARGET.search(self.operands)
        return found[1] if found else ""

    @property
    def calls(self) -> bool:
        """Whether it enters a subroutine. ptxas also writes some jumps inside a kernel as a CALL that never returns."""
        return self.name == "CALL" and not self.target.startswith(".L_")

    @property
    def bits(self) -> int:
        """What a load from global or shared memory, or a store there, moves for one thread."""
        if self.name not in ("LDG", "STG", "LDS", "STS"):
            return 0
        return next((WIDTH[m] for m in self.opcode.split(".")[1:] if m in WIDTH), 32)

    @property
    def global_bits(self) -> int:
        return self.bits if self.name in ("LDG", "STG") else 0


class Kernel(NamedTuple):
    name: str  # mangled
    instructions: list[Instruction]
    labels: dict[str, int]  # to the instruction's number

    def successors(self, i: int) -> list[int]:
        """Instructions that control may reach from instruction i. A call returns; a BSYNC stands where it leads."""
        instruction = self.instructions[i]
        if instruction.name in UNREADABLE or instruction.opcode in UNREADABLE:
            raise ValueError(f"{self.name}: can't follow {instruction.opcode} at {instruction.address:#06x}")
        beyond = [i + 1] if i + 1 < len(self.instructions) else []
        if instruction.name in ("EXIT", "RET"):
            return beyond if instruction.guard else []
        if instruction.name not in ("BRA", "CALL") or instruction.calls:
            return beyond
        if instruction.target not in self.labels:
            raise ValueError(f"{self.name}: no target for {instruction.opcode} at {instruction.address:#06x}")
        conditional = instruction.guard or "," in instruction.operands  # BRA.U UP0, `(label)
        return [self.labels[instruction.target], *(beyond if conditional else [])]


def parse(text: str) -> list[Kernel]:
    """The kernels in what `nvdisasm -c` prints. What a kernel calls is printed in its section and stays part of it."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if section := SECTION.match(line):
            kernels.append(Kernel(section[1], [], {}))
        elif not kernels:
            continue
        elif label := LABEL.match(line):
            kernels[-1].labels[label[1]] = len(kernels[-1].instructions)
        elif instruction := LINE.match(line):
            address, guard, opcode, operands = instruction.groups()
            kernels[-1].instructions.append(Instruction(int(address, 16), guard or "", opcode, operands))
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            raise ValueError(f"{kernels[-1].name}: can't read {line.strip()}")
    return kernels
