"""Step tables as the kernels read them, on each device, and what their rows need."""

import math
import pickle

import pytest
import torch
from support.choices import for_many
from support.refused import refused
from support.rows import any_float, any_rows, changed, of

from ddpm_ext.ops.row import ROW, WIDTH
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.row_needs import row_needs
from ddpm_ext.tables.step_table import ADDED, COLUMNS, FACTORS, StepRow, StepTable


def within_float32(value):
    return max(-3.4e38, min(3.4e38, value))


@for_many(50)
def test_packed(device, choose):
    """Every number at its name's place, then zeros; the draw by its bits."""
    rows = [
        row._replace(**{name: within_float32(getattr(row, name)) for name in (*FACTORS, *ADDED)})
        for row in any_rows(choose)
    ]
    guidance = [within_float32(any_float(choose)) for _ in rows] if choose.one_of([False, True]) else None
    for dtype, integer in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        packed = of(rows).packed(device, dtype, guidance)
        assert (packed.dtype, packed.device, packed.shape) == (dtype, device, (len(rows), WIDTH))
        assert packed.is_contiguous()
        found = packed.cpu().view(integer)
        for i, name in enumerate(ROW):
            values = [1.0] * len(rows) if name == "w" and guidance is None else guidance
            if name != "w":
                values = [getattr(row, name, 1.0) for row in rows]  # the model's next input is not scaled
            if name == "draw":
                assert (found[:, i].long() & (2**32 - 1)).tolist() == values
            else:
                assert torch.equal(found[:, i], torch.tensor(values, dtype=torch.float64).to(dtype).view(integer)), name
        assert not found[:, len(ROW) :].any()


def test_packed_bad():
    table = changed()
    refused(TypeError, r"dtype is torch.float16, expected torch.float32 or torch.f", table.packed, "cpu", torch.float16)
    for guidance, error, message in (
        ([1, 2], ValueError, r"guidance has shape \(2,\), expected \(3,\), one a row"),
        ([1, math.nan, 2], ValueError, r"guidance\[1\] is nan, expected finite numbers"),
        (["1", "2", "3"], TypeError, "guidance holds <U1"),
    ):
        refused(error, message, table.packed, "cpu", guidance=guidance)
    for call in (table.packed, table.to):
        refused(ValueError, "device is 'nowhere'", call, "nowhere")


@pytest.mark.parametrize(("name", "value"), [("c0", 1e39), ("l1", -3.5e38), ("c1", 1e200)])
def test_numbers_beyond_float32_are_refused_where_they_are_packed(name, value):
    table = changed(**{name: [0.0, value, 0.0]})
    with pytest.raises(ValueError, match=rf"{name}\[1\] is {value:.6g}".replace("+", r"\+") + ", expected .* float32"):
        table.packed("cpu")
    assert table.packed("cpu", torch.float64).abs().max() == abs(value)
    assert changed(**{name: [0.0, 3.4e38, 0.0]}).packed("cpu").isfinite().all()


def test_a_table_on_a_device(device):
    rows = [StepRow(i + 0.5, *range(6), 2**32 - 1 - i, *range(len(ADDED))) for i in range(20)]
    table = of(rows)
    there = table.to(device)
    for name in COLUMNS:
        assert getattr(there, name).device == getattr(there[3:9:2], name).device == device
        assert torch.equal(getattr(there, name).cpu(), getattr(table, name))
    assert there == table and list(there) == rows and there[-1] == rows[-1]
    assert torch.equal(there.packed("cpu").view(torch.int32), table.packed("cpu").view(torch.int32))
    assert there.history and not there.plain
    assert (f"on {device}" in repr(there).splitlines()[0]) == (device.type != "cpu")
    assert pickle.loads(pickle.dumps(there)).a.device == device


def test_kernel_tables(device):
    """The rows, those of x0 alone, the timesteps and further tables: copied once, and pickled without the copies."""
    affine = torch.randn(3, 2, dtype=torch.float64)
    steps, guidance = StepTable([2, 1, 0], *torch.randn(6, 3, dtype=torch.float64), h1=[0, 1, 1]), torch.rand(3)
    x0 = StepTable(steps.timestep, steps.a, steps.b, [1] * 3, [0] * 3, draw=steps.draw)
    with torch.inference_mode():
        tables = KernelTables(steps, guidance, affine=affine)
    for dtype, integer in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        got = tables.get("affine", device, dtype)
        assert torch.equal(got, affine.to(device, dtype)) and got.is_contiguous() and not got.is_inference()
        for name, table in {"steps": steps, "x0": x0}.items():
            packed = table.packed(device, dtype, guidance)  # as floats, a draw's bits may be those of a NaN
            assert torch.equal(tables.get(name, device, dtype).view(integer), packed.view(integer))
    assert torch.equal(tables.get("timesteps", device, torch.int64), steps.timestep.to(device))
    assert tables.find("other", device, torch.float32) is None
    for other in (device, torch.device("meta")):
        assert tables.get("steps", other, torch.float32) is tables.get("steps", other, torch.float32)
    assert {key[1].type for key in pickle.loads(pickle.dumps(tables))._tables} == {"cpu"}


@for_many(60)
def test_what_each_row_needs(choose):
    """By the row's own numbers: of the model, of the noise and of what earlier rows kept."""
    columns = {name: [choose.one_of([0.0, 1.0, 0.5]) for _ in range(4)] for name in (*FACTORS, *ADDED)}
    table, scales = StepTable(range(4), **columns), [choose.one_of([1.0, 2.0]) for _ in range(4)]
    for row, scale, needs in zip(table, scales, row_needs(table, torch.tensor(scales)), strict=True):
        reads_output = bool(row.c2 or row.cu or row.k2)
        calls = bool(row.b) or reads_output
        assert (needs.calls_model, needs.needs_output) == (calls, reads_output)
        assert needs.guided == (calls and (scale != 1 or row.cu != 0))
        assert needs.noisy == (row.s != 0) and needs.history == (row.h1 != 0, row.h2 != 0, row.h3 != 0)
        assert needs.keeps == bool(row.k0 or row.k1 or row.k2)
    assert [needs.guided for needs in row_needs(table)] == [row.cu != 0 for row in table]
