"""What the tests share: repeatable hypothesis runs, the sources' folder, step tables with rows of every kind."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=150, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def make_step_table():
    """A step table (rows, 8) of random numbers. Every third row has no c2, every fourth no noise; draws reach 2^31."""

    def make(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(rows, 8, generator=generator, dtype=torch.float64).to(dtype)
        table[::3, 4] = 0
        table[::4, 5] = 0
        draws = torch.randint(2**31, (rows,), generator=generator)
        table.view(torch.int32 if dtype == torch.float32 else torch.int64)[:, 6] = draws
        table[:, 7] = 0
        return table

    return make


@pytest.fixture
def threads():
    """Sets the number of threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
