"""The variants of the step's kernel that a card must judge: the operator's bits on the stand-in, and in machine code
what each is for."""

from __future__ import annotations

import ctypes

import pytest
import torch
from support.cuda_host.calls import assert_same_bits, step_table, values

from benchmarks.gpu import variants
from benchmarks.gpu.ways import RNG, T
from benchmarks.static.compiler import Missing, build, find_tools
from ddpm_ext.ops.extension import C

pytest_plugins = "support.cuda_host.fixtures"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(len(variants.VARIANTS)), ids=variants.VARIANTS)
def test_bits_of_the_operator(host, number, dtype):
    """Of samples with and without an end beyond whole runs, in one turn and in several; rows with and without noise."""
    library = ctypes.CDLL(str(host.path))
    for device, shape, row in (
        (0, (3, 64), 1),
        (0, (1, 77), 2),
        (0, (1, 3), 0),
        (1, (2, 40_016), 1),
        (1, (1, 70_013), 1),
    ):
        host.control.set_device(device)
        x, m = (values(*shape, seed=seed, dtype=dtype) for seed in (0, 1))
        table = step_table()[row : row + 1].repeat(T + 1, 1)
        rng = (None, RNG.seed_value, None, 0, 0, -1, None)
        expected = C.reverse_step(x, m, table, None, T, -1.0, 1.0, None, True, *rng, None)
        out = torch.full_like(x, -63)
        assert_same_bits(variants.step(library, number, x, m, out, table, table[T].clone()), expected)


def test_the_noise_is_drawn_before_the_wait(tmp_path):
    """And nothing is read or written before it. No other variant waits, and none but that of five blocks spills."""
    try:
        tools = find_tools()
    except Missing as missing:
        pytest.skip(str(missing))
    if "90" not in tools.archs:
        pytest.skip("this nvcc doesn't know sm_90")
    built = build(tools, str(variants.SOURCE), "90", tmp_path)
    assert len(built.kernels) == 2 * len(variants.VARIANTS)
    for kernel in built.kernels:
        places = {
            name: [i.address for i in kernel.instructions if name in i.opcode] for name in ("ACQBULK", "MUFU.RSQ")
        }
        touched = [i.address for i in kernel.instructions if i.name in ("LDG", "STG")]
        used = built.resources[kernel.name]
        assert used.spill_stores == 0 or "FiveBlocks" in kernel.name
        assert used.registers <= (48 if "FiveBlocks" in kernel.name else 64)
        if "NoiseAhead" in kernel.name:
            (wait,) = places["ACQBULK"]
            assert wait < min(touched)
            assert sum(root < wait for root in places["MUFU.RSQ"]) == 4
        else:
            assert not places["ACQBULK"]
