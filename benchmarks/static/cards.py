"""Cards as NVIDIA publishes them, and what their SMs do in a clock: what is published of that, and what is assumed."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    name: str
    arch: str
    sms: int
    clock: float  # GHz, boost
    bandwidth: float  # GB/s
    tflops: float  # float32 as published, to check SMs and clock by
    source: str


CARDS = [
    Card("A100 SXM 80GB", "80", 108, 1.410, 2039, 19.5, "A100 data sheet and architecture whitepaper"),
    Card("H100 SXM", "90", 132, 1.980, 3350, 66.9, "H100 data sheet and architecture whitepaper"),
    Card("B200", "100", 148, 1.965, 8000, 75, "HGX B200 data sheet; SMs and clock as drivers report them"),
    Card("RTX 5090", "120", 170, 2.407, 1792, 104.8, "RTX Blackwell architecture whitepaper"),
]
ARCHS = [card.arch for card in CARDS]

# NVIDIA's names for them are in Nsight Compute's Profiling Guide, "Pipelines".
PIPES = {
    "issue": "the schedulers: every instruction",
    "fma": "FMA, from 9.0 on in two halves, Heavy and Lite: float32 arithmetic",
    "heavy": "FMA Heavy alone, which also multiplies integers",
    "half": "FP16: half precision, where FMA doesn't do it",
    "alu": "ALU: integers but for products, logic, comparisons",
    "xu": "XU: conversions, square roots",
    "lsu": "LSU: loads and stores, shuffles",
    "double": "FP64: float64 arithmetic",
}
# Threads a clock an SM.
RATES: dict[str, dict[str, float]] = {
    "80": {"issue": 128, "fma": 64, "half": 64, "alu": 64, "xu": 16, "lsu": 32, "double": 32},
    "90": {"issue": 128, "fma": 128, "heavy": 64, "alu": 64, "xu": 16, "lsu": 32, "double": 64},
    "100": {"issue": 128, "fma": 128, "heavy": 64, "alu": 64, "xu": 16, "lsu": 32, "double": 64},
    "120": {"issue": 128, "fma": 128, "heavy": 64, "alu": 64, "xu": 16, "lsu": 32, "double": 2},
}

PUBLISHED = [
    'CUDA C++ Best Practices Guide, "Throughput of Native Arithmetic Instructions" (in the CUDA C++ Programming Guide '
    "until CUDA 12): float32 add, multiply and fma 64 on 8.0, 128 after; 32-bit integer multiply 64; logic, shifts and "
    "comparisons 64; integer add 64, 128 on 12.0; reciprocal square root 16; float64 add and multiply 32 on 8.0, 64 on "
    "9.0 and 10.0, 2 on 12.0; shuffles 32",
    "architecture whitepapers: four schedulers an SM, each a warp's instruction a clock; 32 load/store units; on 12.0 "
    "a core does float32 or int32 in a clock, so that both count against fma there",
    'Nsight Compute, Profiling Guide, "Pipelines": which pipe executes which instructions',
]

ASSUMED = [
    "IMAD.WIDE and IMAD.HI keep the multiplier for two clocks: not published, others measure half of IMAD's rate",
    "on 8.0 IMAD shares the one FMA pipe with float32; from 9.0 on FMA Heavy alone multiplies integers",
    "comparisons, selections, minima and maxima of floats, PRMT, I2FP and F2FP run in the ALU; F2FP on 12.0 in the XU",
    "I2F, F2I and MUFU share the XU, and so do conversions of float64, at most as fast as its arithmetic",
    "half2 instructions (they convert float16 and make constants) take both halves of FMA; on 8.0 a pipe at 64",
    "FFMA2, FMUL2 and FADD2 of 10.0 take both halves of FMA at once",
    "an access of 128 bits keeps a load/store unit for four clocks, to shared memory, too",
    "branches, barriers, special registers and the uniform datapath cost an issue slot and nothing else",
]
