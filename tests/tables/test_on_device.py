"""Step tables as the kernels read them, on each device."""

import pickle

import torch
from support.choices import for_many

from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.step_table import StepTable


@for_many(50)
def test_packed(device, choose):
    timesteps = choose.several(lambda: choose.integer(0, 2**31 - 1), 1, 9)
    dtype = choose.one_of([torch.float32, torch.float64])
    rows = len(timesteps)
    columns = torch.randn(6, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    table = StepTable(torch.tensor(timesteps), *columns, draw=torch.tensor(timesteps))
    assert len(table) == rows
    packed = table.packed(device, dtype)
    assert packed.dtype == dtype
    assert packed.device == device
    assert packed.shape == (rows, 8)
    assert packed.is_contiguous()
    assert torch.equal(packed[:, :6].cpu(), columns.T.to(dtype))
    bits = packed.view(torch.int32 if dtype == torch.float32 else torch.int64)
    assert bits[:, 6].tolist() == timesteps
    assert (bits[:, 7] == 0).all()


def test_device_tables(device):
    timestep = torch.tensor([0, 1, 2])
    columns = torch.randn(6, 3, dtype=torch.float64)
    affine = torch.randn(3, 2, dtype=torch.float64)
    steps = StepTable(timestep, *columns)
    with torch.inference_mode():
        tables = KernelTables(steps, affine=affine)
    for dtype in (torch.float32, torch.float64):
        got = tables.get("affine", device, dtype)
        assert torch.equal(got, affine.to(device, dtype))
        assert got.is_contiguous()
        assert not got.is_inference()
        # As floats, the bits of the timesteps may be those of a NaN.
        integer = torch.int32 if dtype == torch.float32 else torch.int64
        packed = steps.packed(device, dtype)
        assert torch.equal(tables.get("steps", device, dtype).view(integer), packed.view(integer))
    assert torch.equal(tables.get("timesteps", device, torch.int64), timestep.to(device))


def test_device_tables_are_copied_once_and_pickled_without_copies(device):
    tables = KernelTables(StepTable(torch.tensor([0, 1, 2]), *torch.randn(6, 3, dtype=torch.float64)))
    for other in (device, torch.device("meta")):
        assert tables.get("steps", other, torch.float32) is tables.get("steps", other, torch.float32)
    assert {key[1].type for key in pickle.loads(pickle.dumps(tables))._tables} == {"cpu"}
