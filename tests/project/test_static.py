"""benchmarks/static on hand-written machine code: how it is read, the path that is found, the times that follow."""

from collections import Counter

import pytest
from support.refused import refused

from benchmarks.static import compiler, kernels, path, pipes, report, sass
from benchmarks.static.cards import ARCHS, CARDS, RATES, Card
from benchmarks.static.roofline import roofline

NAME = "_ZN8ddpm_ext4cuda11elementwiseINS0_12_GLOBAL__N_15RandnELNS_5NoiseE2ELb0ELNS0_6AccessE0EfffEEvv"


def listing(*lines: str, name: str = NAME) -> str:
    """A listing in nvdisasm's format of instructions with semicolons between: labels as they are, and addresses."""
    text, address = [f'\t.section\t.text.{name},"ax",@progbits', f".text.{name}:", f"{name}:"], 0
    for line in "; ".join(lines).split("; "):
        if line.endswith(":"):
            text.append(line)
            continue
        guard, _, rest = line.rpartition("| ")
        text.append(f"        /*{address:04x}*/              {guard:>5} {rest} ;")
        address += 16
    return "\n".join(text)


def kernel(*lines: str) -> sass.Kernel:
    (found,) = sass.parse(listing(*lines))
    return found


def opcodes(instructions) -> str:
    return " ".join(i.opcode for i in instructions)


# A thread draws two normals or none and adds them to a vector. The last elements have a path of their own.
STRAIGHT = (
    "S2R R0, SR_TID.X; @P0| EXIT; @!P1| BRA `(.L_x_1); MUFU.RSQ R2, R3; @P2| BRA `(.L_x_0); MOV R20, 0x60; "
    "CALL.REL.NOINC `($slow); .L_x_0:; FFMA R4, R2, R3, R4; .L_x_1:; @P3| BRA `(.L_x_2); LDG.E.128 R8, "
    "desc[UR4][R6.64]; STG.E.128 desc[UR4][R6.64], R8; EXIT; .L_x_2:; STG.E desc[UR4][R6.64], R8; EXIT; $slow:; "
    "RET.REL.NODEC R20 `(back); .L_x_3:; BRA `(.L_x_3); NOP"
)

LOOP = (
    "S2R R0, SR_TID.X; BSSY B0, `(.L_x_1); @P0| BRA `(.L_x_2); .L_x_0:; FFMA R4, R2, R3, R4; STG.E.128 "
    "desc[UR4][R6.64], R8; STG.E.128 desc[UR4][R6.64+0x10], R12; @!P1| BRA `(.L_x_0); .L_x_2:; BSYNC B0; .L_x_1:; "
    "@P2| EXIT; .L_x_3:; STG.E desc[UR4][R6.64], R8; @P3| BRA `(.L_x_3); EXIT"
)


def test_parse():
    text = listing("@P0| IMAD.WIDE.U32 R4, R5.reuse, c[0x0][0x4], R2", ".L_x_7:", "@!UP1| UMOV UR4, URZ", name="one")
    first, second = sass.parse(text + "\n" + listing("EXIT", name="two"))
    assert (first.name, second.name) == ("one", "two")
    assert first.labels == {"one": 0, ".L_x_7": 1} and opcodes(second.instructions) == "EXIT"
    widths = {"LDG.E.128": 128, "STG.E.64": 64, "LDG.E.U16.CONSTANT": 16, "STG.E.U8": 8, "LDC.64": 0}
    assert {opcode: sass.Instruction(0, "", opcode, "R0, R2").global_bits for opcode in widths} == widths
    shared = sass.Instruction(0, "", "STS.128", "R0, [R2]")
    assert (shared.bits, shared.global_bits) == (128, 0)
    wide, move = first.instructions
    assert wide == sass.Instruction(0, "P0", "IMAD.WIDE.U32", "R4, R5.reuse, c[0x0][0x4], R2")
    assert (move.address, move.guard, move.name) == (16, "!UP1", "UMOV")


def test_way_through_straight_code():
    """The path draws the noise, and leaves out the call and the last elements."""
    way = path.hot_path(kernel(STRAIGHT))
    assert not way.loops and way.once == []
    assert opcodes(way.turn) == "S2R EXIT BRA MUFU.RSQ BRA FFMA BRA LDG.E.128 STG.E.128 EXIT"
    assert way.issued(5) == Counter(way.turn)  # there is no loop to repeat


STORE, LOAD, ADD = "STG.E.128 desc[UR4][R6.64], R8", "LDG.E.128 R8, desc[UR4][R6.64]", "FADD R0, R1, R2"
# Listings, the instructions of a turn and those of once; a path without a loop has no second.
WAYS = {
    LOOP: ("FFMA STG.E.128 STG.E.128 BRA", "S2R BSSY BRA BSYNC EXIT"),
    # ptxas closes loops for sm_80 like this. The part that leads back to the head belongs to an iteration.
    f"MOV R0, RZ; .L_x_0:; {ADD}; {STORE}; @P0| CALL.REL.NOINC `(.L_x_1); NOP; BRA `(.L_x_0); .L_x_1:; EXIT": (
        ("FADD STG.E.128 CALL.REL.NOINC NOP BRA", "MOV EXIT")
    ),
    # Whether a turn ends with the loads of the next decides a branch around them or a predicate.
    f".L_x_0:; {ADD}; {STORE}; @P0| BRA `(.L_x_1); {LOAD}; .L_x_1:; @!P0| BRA `(.L_x_0); EXIT": (
        ("FADD STG.E.128 BRA LDG.E.128 BRA", "EXIT")
    ),
    # The innermost loop, one copy of an unrolled loop, and a last way back to the head and out from there.
    f".L_x_0:; MOV R0, RZ; .L_x_1:; {ADD}; {STORE}; @P0| BRA `(.L_x_1); @P1| BRA `(.L_x_0); EXIT": (
        ("FADD STG.E.128 BRA", "MOV BRA EXIT")
    ),
    f"@P0| BRA `(.L_x_1); .L_x_0:; {STORE}; {STORE}; @P1| BRA `(.L_x_0); .L_x_1:; @P2| EXIT; {ADD}; {STORE}; EXIT": (
        ("BRA EXIT FADD STG.E.128 EXIT", "")
    ),
    f"MOV R0, RZ; .L_x_0:; @P0| EXIT; {ADD}; {STORE}; BRA `(.L_x_0)": ("EXIT FADD STG.E.128 BRA", "MOV EXIT"),
}


def test_ways():
    for code, (turn, once) in WAYS.items():
        way = path.hot_path(kernel(code))
        assert (opcodes(way.turn), opcodes(way.once), way.loops) == (turn, once, bool(once))
        assert sum(way.issued(7).values()) == len(way.once) + (7 if once else 1) * len(way.turn)


def test_way_with_all_options():
    """The path takes the loads and stores that branches may skip, and the more expensive of two alternatives."""
    code = (
        f"@P0| BRA `(.L_x_0); {LOAD}; .L_x_0:; @P1| BRA `(.L_x_1); FFMA R4, R2, R3, R4; FFMA R4, R2, R3, R4; "
        f"BRA `(.L_x_2); .L_x_1:; MUFU.RSQ R2, R3; .L_x_2:; {STORE}; @P2| BRA `(.L_x_3); {STORE}; .L_x_3:; "
        "@P3| EXIT; STG.E desc[UR4][R6.64], R8; EXIT"
    )
    way = opcodes(path.hot_path(kernel(code), has_options=True).turn)
    assert way == "BRA LDG.E.128 BRA FFMA FFMA BRA STG.E.128 BRA STG.E.128 EXIT"
    assert opcodes(path.hot_path(kernel(code)).turn) == "BRA BRA MUFU.RSQ STG.E.128 BRA EXIT"


def test_what_cannot_be_read_is_an_error():
    refused(ValueError, "can't read", sass.parse, listing("EXIT") + "\n        /*0010*/        { imad r0 } ;")
    for code, message in (
        (f"BRX R0 -0x10; {STORE}; EXIT", "can't follow BRX"),
        (f"BRA `(.L_x_9); {STORE}; EXIT", "no target"),
        ("STG.E desc[UR4][R6.64], R8; EXIT", "128-bit store"),
    ):
        refused(ValueError, message, path.hot_path, kernel(code))
    (instruction,) = kernel("QUUX.32 R0, R1").instructions
    refused(ValueError, r"QUUX\.32", pipes.load, instruction, "90")


# The threads of a block store four derivatives and their losses. The first warp adds up the losses, and its first
# thread counts blocks.
BLOCK = (
    "S2R R0, SR_TID.X; .L_x_0:; @P0| BRA `(.L_x_1); @P1| BRA `(.L_x_9); LDG.E.64 R8, desc[UR4][R6.64]; .L_x_9:; FFMA "
    "R4, R2, R3, R4; @P2| BRA `(.L_x_1); STG.E.64 desc[UR4][R6.64], R8; .L_x_1:; STS.128 [R3], R8; "
    "BAR.SYNC.DEFER_BLOCKING 0x0; @P3| BRA `(.L_x_2); LDS R16, [R14]; SHFL.DOWN PT, R15, R11, 0x10, 0x1f; DADD R14, "
    "R10, R14; @!P0| STG.E.64 desc[UR4][R10.64], R14; .L_x_2:; @!P4| BRA `(.L_x_0); @P5| BRA `(.L_x_3); "
    "ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R5; .L_x_3:; @!P6| EXIT; LDG.E.64.STRONG.SYS R4, "
    "desc[UR4][R4.64]; STG.E desc[UR4][R10.64], R9; EXIT"
)


def test_way_of_a_block_that_adds_up():
    """The first of four warps adds up besides the work of all. The last block's extra work is left out."""
    way = path.team_path(kernel(BLOCK), share=0.25)
    every = "BRA BRA LDG.E.64 FFMA BRA STG.E.64 STS.128 BAR.SYNC.DEFER_BLOCKING BRA"
    assert way.loops and way.first.loops and way.share == 0.25
    assert opcodes(way.turn) == f"{every} BRA" and opcodes(way.once) == "S2R BRA EXIT"
    assert opcodes(way.first.turn) == f"{every} LDS SHFL.DOWN DADD STG.E.64 BRA"
    assert opcodes(way.first.once) == "S2R BRA ATOMG.E.ADD.STRONG.GPU EXIT"
    issued = Counter()
    for instruction, times in way.issued(8).items():
        issued[instruction.opcode] += times
    assert issued["FFMA"] == 8 and issued["DADD"] == 8 / 4 and issued["STG.E.64"] == 8 + 8 / 4
    assert issued["ATOMG.E.ADD.STRONG.GPU"] == 1 / 4 and issued["S2R"] == 1


CLASSES = {
    "integer": "IADD3 R0, R1, R2, RZ; IMAD.MOV.U32 R0, RZ, RZ, R1; IMAD.SHL.U32 R0, R1, 0x4, RZ; "
    "IMAD.U32 R5, RZ, RZ, UR53; HFMA2.MMA R8, -RZ, RZ, 0, 0",
    "multiply": "IMAD.WIDE.U32 R0, R1, R2, RZ; IMAD R0, R1, R2, RZ",
    "float": "FFMA2 R0, R2.F32x2.HI_LO, R4.F32x2.HI_LO, R6.F32x2.HI_LO; FMNMX.NAN R0, R1, R2, !PT; DADD R0, R2, R4",
    "convert": "HADD2.F32 R0, -RZ, R10.H0_H0; F2F.F64.F32 R0, R2; F2FP.BF16.F32.PACK_AB R0, R1, R2; MUFU.RSQ R0, R1",
    "memory": "SHFL.DOWN PT, R0, R1, 0x10, 0x1f; LDC.64 R0, c[0x0][0x10]",
    "other": "CGAERRBAR; LDCU.64 UR4, c[0x0][0x10]; UIADD3 UR4, UR4, 0x1, URZ",
}


def test_classes():
    for kind, code in CLASSES.items():
        for instruction in kernel(code).instructions:
            assert pipes.classify(instruction) == kind, instruction
            assert all(pipes.load(instruction, arch).keys() <= RATES[arch].keys() for arch in ARCHS)


def test_turns_of_pipes():
    code = "IMAD.WIDE.U32 R0, R1, R2, RZ; IADD3 R0, R1, R2, RZ; HADD2.F32 R0, -RZ, R1.H0_H0; LDG.E.128 R0, [R2.64]"
    wide, add, half, vector = kernel(code).instructions
    assert pipes.load(wide, "80") == {"issue": 1, "fma": 2}
    assert pipes.load(wide, "90") == {"issue": 1, "fma": 2, "heavy": 2}
    assert pipes.load(add, "100") == {"issue": 1, "alu": 1} and pipes.load(add, "120") == {"issue": 1, "fma": 1}
    assert pipes.load(half, "80") == {"issue": 1, "half": 1}
    assert pipes.load(half, "90") == {"issue": 1, "fma": 2, "heavy": 1}
    assert pipes.load(vector, "90") == {"issue": 1, "lsu": 4}
    double, wider, shared = kernel("DADD R0, R2, R4; F2F.F64.F32 R0, R2; STS.128 [R3], R8").instructions
    for arch in ARCHS:
        assert pipes.load(double, arch) == {"issue": 1, "double": 1}
        assert pipes.load(wider, arch) == {"issue": 1, "xu": 8 if arch == "120" else 1}
        assert pipes.load(shared, arch) == {"issue": 1, "lsu": 4}


def test_cards_reach_their_published_tflops():
    for card in CARDS:
        assert 2 * RATES[card.arch]["fma"] * card.sms * card.clock * 1e-3 == pytest.approx(card.tflops, rel=0.01), card


def test_roofline_by_hand():
    """4 elements of 8 bytes on 10 SMs of 1 GHz at 100 GB/s need 80 ps each. A clock of 10 SMs is 100 ps a thread."""
    products, shifts = ["IMAD.WIDE.U32 R0, R1, R2, RZ"] * 2, ["LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT"] * 4
    k = kernel(*["FFMA R0, R1, R2, R3"] * 6, *products, *shifts, "MUFU.RSQ R0, R1", STORE, "EXIT")
    card = Card("card", "90", 10, 1.0, 100, 0, "")
    line = roofline(card, Counter(k.instructions), 4, 8)
    assert line.memory == pytest.approx(80)
    # issues / 4 elements / rate x 100 ps
    expected = {"issue": 15 / 128, "fma": 10 / 128, "heavy": 4 / 64, "alu": 4 / 64, "xu": 1 / 16, "lsu": 4 / 32}
    expected["double"] = 0
    assert line.pipes == pytest.approx({pipe: clocks / 4 * 100 for pipe, clocks in expected.items()})
    assert (line.busiest, line.bound) == ("lsu", "memory")
    assert line.floor == pytest.approx(80) and line.ratio == pytest.approx(3.125 / 80)
    fast = roofline(card._replace(bandwidth=4000), Counter(k.instructions), 4, 8)
    assert fast.memory == pytest.approx(2) and fast.bound == "lsu" and fast.floor == pytest.approx(3.125)


def demangled(op: str, noise: int, seed: str, access: int, *types: str) -> str:
    inner = f"ddpm_ext::cuda::(anonymous namespace)::{op}, (ddpm_ext::Noise){noise}, {seed}"
    return f"void ddpm_ext::cuda::elementwise<{inner}, (ddpm_ext::cuda::Access){access}, {', '.join(types)}>(int, int)"


def test_variants():
    v = kernels.variant(demangled("ReverseStep", 1, "false", 0, "float", "__half", "float"))
    assert v == kernels.Variant("ReverseStep", "given", "vector", False, ("float", "__half", "float", "float"))
    assert (v.bytes_an_element, v.bytes_written, v.dtypes) == (14, 4, "float32 / float16 / float32")
    v = kernels.variant(demangled("Randn", 2, "true", 1, *["__nv_bfloat16"] * 3))
    assert (v.noise, v.device_seed, v.access) == ("drawn", True, "strided")
    assert (v.bytes_an_element, v.dtypes) == (2, "bfloat16") and not v.has_options
    of_step = "with_options<(ddpm_ext::cuda::Access)0, ddpm_ext::cuda::AnyOptions, float, __half>(ddpm_ext::StepCall)"
    of_loss = "loss_of_samples<{}, (ddpm_ext::Noise)1, (ddpm_ext::cuda::Access)0, float, __half>(ddpm_ext::LossArgs)"
    # x, noise, x_start, three of the history, gradient, known, mask; three outputs of the model; four results. Of a
    # loss: x_start, the model's output, noise; its derivative. With the bound, two halves of the output.
    for inner, title, read, written in (
        (of_step, "step_with_options, all options", 9 * 4 + 3 * 2, 4 * 4),
        (of_loss.format("ddpm_ext::LossRow"), "Loss, noise given", 4 + 2 + 4, 4),
        (of_loss.format("ddpm_ext::VariationalRow"), "Loss with bound, noise given", 4 + 2 * 2 + 4, 2 * 4),
    ):
        v = kernels.variant(f"void ddpm_ext::cuda::(anonymous namespace)::{inner}")
        assert (v.title, v.access, v.bytes_read, v.bytes_written) == (title, "vector", read, written)
        assert v.adds_up == (inner != of_step) and v.has_options and v.dtypes.startswith("float32 / float16")
    assert kernels.share_that_adds_up() == 2 / 4


@pytest.mark.subprocess
@pytest.mark.skipif(kernels.demangler() is None, reason="no c++filt to read the kernels' names")
def test_report():
    """A loop of 4 instructions for 8 float32, on an H100: memory needs 4 B / 3350 GB/s."""
    usage = compiler.Resources(33, stack=0, local=0, shared=0, spill_stores=4, spill_loads=0)
    build = compiler.Build("affine", "90", "", set(), [kernel(LOOP)], {NAME: usage})
    (finding,) = report.findings([build])
    assert (finding.items, finding.elements(100)) == (8, 800)
    shares = dict.fromkeys(CLASSES, 0) | {"float": 1 / 8, "memory": 2 / 8, "other": 1 / 8 + 5 / 800}
    assert finding.classes(100) == pytest.approx(shares)
    text = report.render([build], ["a heading"], [100])
    assert "- a heading" in text and "1 of 1 kernels loop over vectors" in text
    assert "- spills: 1 of 1 kernels, at most 4" in text and "- calls: none of 1 kernels" in text
    (card,) = [card for card in CARDS if card.arch == "90"]
    line = finding.roofline(card, 100)
    assert line.memory == pytest.approx(4 / 3.350)
    found = f"{line.memory:.2f}, {line.busiest} {line.compute:.2f}, {line.ratio:.2f}"
    assert f"| Randn, noise drawn | float32 | 4 | {found} |" in text and "A100" not in text
