"""Sorts instructions: into kinds of work, and onto the pipes that execute them (cards.py says how fast)."""

from __future__ import annotations

from benchmarks.static.cards import RATES
from benchmarks.static.sass import Instruction

CLASSES = ["integer", "multiply", "float", "convert", "memory", "other"]

FLOAT = {"FFMA", "FADD", "FMUL"}
FLOAT2 = {"FFMA2", "FADD2", "FMUL2"}
FLOAT_ALU = {"FSETP", "FSEL", "FMNMX", "FMNMX3", "FSET", "FCHK"}
ADD = {"IADD", "IADD3", "VIADD", "IADD64"}
ALU = {
    *(
        "LOP3",
        "LOP",
        "SHF",
        "SHL",
        "SHR",
        "LEA",
        "ISETP",
        "SEL",
        "PRMT",
        "MOV",
        "IMNMX",
        "VIMNMX",
        "VIMNMX3",
        "VIADDMNMX",
    ),
    *("IABS", "PLOP3", "P2R", "R2P", "SGXT", "BMSK", "CS2R", "MOV64", "ISETP64"),
}
DOUBLE = {"DADD", "DMUL", "DFMA"}
HALF = {"HADD2", "HFMA2", "HMUL2"}
XU = {"MUFU", "I2F", "F2I", "F2F", "FLO", "POPC", "BREV"}
ALU_CONVERT = {"I2FP", "F2FP"}
MEMORY = {"LDG", "STG", "LDC", "LDL", "STL", "LDS", "STS", "LD", "ST", "LDGSTS", "RED", "ATOM", "ATOMG", "SHFL"}
OTHER = {
    *("BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "NOP", "WARPSYNC", "YIELD", "BREAK", "NANOSLEEP", "DEPBAR"),
    *("S2R", "S2UR", "R2UR", "LDCU", "ACQBULK", "PREEXIT", "CCTL", "ERRBAR", "MEMBAR", "VOTE", "VOTEU", "BAR"),
    *("CGAERRBAR", "ENDCOLLECTIVE"),
}
WIDE = 2  # an assumption: cards.py
# IMAD under these names moves, shifts or adds.
NOT_PRODUCTS = {"MOV", "SHL", "IADD", "X"}


def is_move(i: Instruction) -> bool:
    """Whether a multiply-add only moves, shifts or adds a register: the compiler takes whichever pipe is idle."""
    if i.name == "IMAD":
        return not NOT_PRODUCTS.isdisjoint(i.opcode.split(".")) or (
            i.opcode == "IMAD.U32" and i.operands.split(",")[1].strip() == "RZ"
        )
    return i.name == "HFMA2" and [part.strip() for part in i.operands.split(",")][1:3] == ["-RZ", "RZ"]


def uniform(i: Instruction) -> bool:
    return i.name.startswith("U") and i.name not in MEMORY


def classify(i: Instruction) -> str:
    """One of CLASSES."""
    if i.name in OTHER or uniform(i):
        return "other"
    if i.name in ADD | ALU or is_move(i):
        return "integer"
    if i.name == "IMAD":
        return "multiply"
    if i.name in XU | ALU_CONVERT or i.opcode.startswith("HADD2.F32"):
        return "convert"
    if i.name in FLOAT | FLOAT2 | FLOAT_ALU | HALF | DOUBLE:
        return "float"
    if i.name in MEMORY:
        return "memory"
    raise ValueError(f"{i.opcode} is not among the instructions that benchmarks/static/pipes.py knows")


def load(i: Instruction, arch: str, wide: int = WIDE) -> dict[str, float]:
    """How many threads' turns of each pipe of an architecture an instruction takes, for one thread; `wide`: those of a
    product of 64 bits."""
    classify(i)
    rates = RATES[arch]
    unified = arch == "120"  # integers other than products are done by the cores that do float32
    costs: dict[str, float] = {"issue": 1}
    if i.name in FLOAT:
        costs["fma"] = 1
    elif i.name in FLOAT2:
        costs |= {"fma": 2, "heavy": 1}
    elif i.name == "IMAD":
        cost = wide if {"WIDE", "HI"} & set(i.opcode.split(".")) else 1
        costs |= {"fma": cost, "heavy": cost}
    elif i.name in DOUBLE:
        costs["double"] = 1
    elif i.name in HALF:
        costs |= {"half": 1} if "half" in rates else {"fma": 2, "heavy": 1}
    elif unified and i.name in ADD:
        costs["fma"] = 1
    elif unified and i.name == "F2FP":
        costs["xu"] = 1
    elif i.name in ADD | ALU | FLOAT_ALU | ALU_CONVERT:
        costs |= {"alu": 1, "fma": 1} if unified else {"alu": 1}
    elif i.name in XU:
        costs["xu"] = max(1, rates["xu"] / rates["double"]) if ".F64" in i.opcode else 1
    elif i.name in MEMORY:
        costs["lsu"] = max(1, i.bits / 32)
    return {pipe: cost for pipe, cost in costs.items() if pipe in rates}
