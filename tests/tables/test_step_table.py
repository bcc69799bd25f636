"""Step tables are checked, read, sliced and compared: their rows against Python's own numbers."""

import copy
import dataclasses
import math
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.choices import for_many
from support.refused import refused
from support.rows import any_float, any_rows, bits, changed, of

from ddpm_ext import Philox, StepTable, ops
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.step_table import ADDED, COLUMNS, FACTORS, StepRow

KINDS = (
    *(list, tuple, torch.tensor),
    lambda values: torch.nn.Parameter(torch.tensor(values, dtype=torch.float32)),
    lambda values: np.array(values, np.longdouble),
    lambda values: np.array(values, ">f8"),
    lambda values: np.array(values[::-1])[::-1],
)


def test_kinds_of_columns():
    for kind in KINDS:
        column = changed(a=kind([3, 2, 0])).a
        assert column.tolist() == [3.0, 2.0, 0.0] and column.dtype == torch.float64 and not column.requires_grad
    for draw in ([0, 1, 2], range(3), torch.arange(3, dtype=torch.int32), np.arange(3, dtype=np.uint32)):
        assert changed(draw=draw).draw.tolist() == [0, 1, 2] and changed(draw=draw).draw.dtype == torch.int64


def test_written_by_hand(device):
    """Columns that are not given are zeros, and the kernel accepts the table."""
    table = StepTable(timestep=[9, 4], a=[2, 1], b=[-1, 0], c0=[0.5, 1], c1=[0.25, 0])
    assert table.c2.tolist() == table.s.tolist() == [0.0, 0.0]
    assert list(table[:1]) == [(9, 2.0, -1.0, 0.5, 0.25, 0.0, 0.0, 9, *[0.0] * len(ADDED))]
    assert StepRow(9, 2.0, -1.0, 0.5, 0.25, 0.0, 0.0, 9) == table[0] and table.plain
    x, m = torch.tensor([[0.5, -0.25]], device=device), torch.tensor([[0.75, 0.5]], device=device)
    prev = ops.reverse_step(x, m, table.packed(device), 0, rng=Philox(1))
    assert prev.tolist() == [[0.5 * 0.25 + 0.25 * 0.5, 0.5 * -1.0 + 0.25 * -0.25]]


def test_columns_are_copies():
    for values in (torch.ones(3, dtype=torch.float64), np.ones(3)):
        steps = torch.tensor([2, 1, 0])
        table = changed(timestep=steps, a=values, s=values)
        values[:] = 7
        steps[:] = 7
        assert table == changed(a=[1, 1, 1], s=[1, 1, 1]) and table.a.data_ptr() != table.s.data_ptr()
    part = table[:]
    part.a[0] = 7
    assert table.a[0] == 1


def test_under_modes():
    """The columns are ordinary tensors, whatever mode of torch is active when a table is made or sliced."""
    with torch.inference_mode(), torch.device("meta"):
        table = changed(s=torch.ones(3, device="cpu"))
        part = table[::-1]
    for made in (table, part):
        for name in COLUMNS:
            assert getattr(made, name).is_cpu and not getattr(made, name).is_inference()
    with torch.device("meta"):
        assert table.packed("cpu", guidance=[1, 2, 3]).is_cpu
        assert part[::-1] == table == pickle.loads(pickle.dumps(table))


def test_refused():
    for columns, error, message in (
        ({"timestep": []}, ValueError, r"timestep has shape \(0,\), expected \(rows,\) with at least 1 row"),
        ({"timestep": 3}, ValueError, r"timestep has shape \(\), expected \(rows,\)"),
        ({"timestep": [True, False, True]}, TypeError, "timestep holds a bool"),
        ({"timestep": [math.inf, 1, 0]}, ValueError, r"timestep\[0\] is inf, expected finite"),
        ({"timestep": np.array([1, 2**63, 3], np.uint64)}, ValueError, "timestep holds 9223372036854775808"),
        ({"timestep": [2**32 - 1, 2**32, 0]}, ValueError, r"timestep\[1\] is 4294967296, .* give draw"),
        ({"timestep": [2**31, 2**31, 2**31]}, ValueError, r"timestep\[1\] .* draw noise 4294967297, .* give draw"),
        ({"a": [1, 2]}, ValueError, r"a has shape \(2,\), expected \(3,\), one a row as timestep"),
        ({"c1": [[1], [2, 3], 4]}, ValueError, "c1 is not 1-dimensional"),
        ({"a": [1, math.nan, -math.inf]}, ValueError, r"a\[1\] is nan, expected finite numbers"),
        ({"a": "abc"}, TypeError, "a holds <U3, expected real numbers"),
        ({"a": [1.0, True, 2.0]}, TypeError, "a holds a bool"),
        ({"a": [None, 1, 2]}, TypeError, "a holds NoneType"),
        ({"draw": [0.0, 1.0, 2.0]}, TypeError, "draw holds float64, expected integers"),
        ({"draw": [0, 1, -1]}, ValueError, r"draw\[2\] is -1, expected 0 <= draw < 2\^32"),
        ({"draw": [0, 2**64, 1]}, ValueError, "draw holds 18446744073709551616, expected numbers below"),
        ({"signal_now": [0, 2, -0.1]}, ValueError, r"signal_now\[2\] is -0.1, expected signal_now >= 0"),
    ):
        refused(error, message, changed, **columns)


@for_many(100)
def test_draws_of_timesteps_that_come_again(choose):
    floats = choose.one_of([False, True])  # floats may be whole numbers, too
    timesteps = choose.several(lambda: choose.integer(0, choose.one_of([3, 1000])), 1, 20)
    column = [0.0] * len(timesteps)
    draws = StepTable([float(t) for t in timesteps] if floats else timesteps, *[column] * 4).draw.tolist()
    for i, (t, draw) in enumerate(zip(timesteps, draws, strict=True)):
        assert draw == t + timesteps[:i].count(t) * (max(timesteps) + 1)
    assert len(set(draws)) == len(draws)
    once = [t for t, count in Counter(timesteps).items() if count == 1]
    assert all(draws[timesteps.index(t)] == t for t in once)


def test_draws_between_the_timesteps_are_the_rows():
    for timestep in ([2.5, 1.0, 0.0], [2.0, 1.0, 1e-300], [-1, 5, 5], [-2.0, 1.0, 0.0]):
        assert changed(timestep=timestep).draw.tolist() == [0, 1, 2]
    assert changed(timestep=[2**32 - 1, 1, 0]).draw.tolist() == [2**32 - 1, 1, 0]


@pytest.mark.parametrize("name", ADDED)
def test_which_rows_are_plain_and_which_have_history(name):
    """A gradient's weights and the levels are read only if they are used."""
    table, zeros = changed(**{name: [0, 1, 0]}), changed(**{name: [0.0, -0.0, 0.0]})
    assert [getattr(row, name) for row in table] == [0, 1, 0]
    assert table.plain == (name in ("g0", "g1", *LEVELS)) and zeros.plain
    assert table.history == (name[0] in "hk") and not zeros.history


@for_many(100)
def test_indices_and_slices_are_a_lists(choose):
    rows = any_rows(choose)
    table, count = of(rows), len(rows)
    assert len(table) == count
    for i in range(-count, count):
        assert table[i] == table[np.int64(i)] == rows[i]
        assert [type(value) for value in table[i]] == [type(value) for value in rows[i]]
    for bad in (count, -count - 1):
        with pytest.raises(IndexError, match=f"row {bad} of a table of {count} rows"):
            table[bad]
    ends = [None, *range(-count - 2, count + 3)]
    cut = slice(choose.one_of(ends), choose.one_of(ends), choose.one_of([None, 1, 2, 3, -1, -2, -5]))
    if rows[cut]:
        assert bits(table[cut]) == bits(rows[cut]) and table[cut].timestep.dtype == table.timestep.dtype
    else:
        with pytest.raises(ValueError, match=rf"slice\(.* of a table of {count} rows is empty"):
            table[cut]


def test_replace():
    table = changed(s=[1, 2, 3], h1=[0, 1, 0], draw=[7, 8, 9])
    other = dataclasses.replace(table, s=[3, 2, 1], g0=torch.ones(3))
    assert set(table.diff(other).columns) == {"s", "g0"}
    assert other.s.tolist() == [3, 2, 1] and table.s.tolist() == [1, 2, 3] and other.a.data_ptr() != table.a.data_ptr()
    refused(ValueError, r"noise_now\[0\] is -2", dataclasses.replace, table, noise_now=[-2, 0, 0])
    for at in (1.0, None, [0, 1], torch.tensor([0, 1])):
        with pytest.raises(TypeError, match=r"a table's index is .*, expected an int or a slice"):
            table[at]


def test_copies_are_equal_and_frozen():
    table = changed(timestep=[2.5, 1, -0.0], draw=[3, 2**32 - 1, 0])
    for other in (table, copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert bits(other) == bits(table)
        with pytest.raises(dataclasses.FrozenInstanceError):
            other.a = other.b
    refused(TypeError, "unhashable", hash, table)


# ------------------------------------------------------------------------------------------------------- differences


def nearest(number):
    try:
        return float(number)
    except OverflowError:
        return math.inf


@for_many(100)
def test_diff(choose):
    rows = any_rows(choose, 6)
    other = [list(row) for row in rows]
    for _ in range(choose.integer(0, 4)):
        column = COLUMNS.index(choose.one_of([name for name in (*FACTORS, *ADDED) if name not in LEVELS]))
        other[choose.integer(0, len(rows) - 1)][column] = any_float(choose)
    found, expected = of(rows).diff(of(other)), {}
    for name, here, there in zip(COLUMNS, zip(*rows, strict=True), zip(*other, strict=True), strict=True):
        apart = [i for i, (x, y) in enumerate(zip(here, there, strict=True)) if x != y]
        if apart:
            pairs = [(Fraction(here[i]), Fraction(there[i])) for i in apart]
            absolute = max(abs(x - y) for x, y in pairs)
            relative = max(abs(x - y) / max(abs(x), abs(y)) for x, y in pairs)
            distances = (nearest(absolute), pytest.approx(nearest(relative), rel=1e-15))
            expected[name] = (len(apart), apart[0], here[apart[0]], there[apart[0]], *distances)
    assert found.columns == expected and bool(found) == bool(expected) == (of(rows) != of(other))
    report = str(found).splitlines()
    assert [line.split()[0] for line in report] == (["column", *expected] if expected else ["no"])


def test_diff_of_integers():
    """The exact distance of integers that float64 cannot represent. A draw counts as well."""
    table = changed(timestep=[2**62, 1, 0], draw=[1, 2, 3])
    found = table.diff(changed(timestep=[2**62 + 1, 1, 0], draw=[1, 2, 4])).columns
    assert set(found) == {"timestep", "draw"} and found["timestep"][:5] == (1, 0, 2**62, 2**62 + 1, 1)
    assert found["draw"] == (1, 2, 3, 4, 1, 0.25)
    far = 1.5 * 2.0**1023
    assert changed(a=[far, 0, 0]).diff(changed(a=[-far, 0, 0])).columns == {"a": (1, 0, far, -far, math.inf, 2.0)}


def test_diff_of_lengths_and_dtypes():
    table, longer = changed(), StepTable(*(4 * [[3, 2, 1, 0]]), [0] * 4)
    for here, there, words in ((table, longer, "rows: 3 here, 4 there"), (longer, table, "rows: 4 here, 3 there")):
        assert here != there and words in str(here.diff(there)) and here.diff(there).rows == (len(here), len(there))
    found = longer[:2].diff(longer)
    assert found and not found.columns
    found = table.diff(changed(timestep=[2.0, 1.0, 0.0]))
    assert found and not found.columns and str(found) == "timestep: int64 here, float64 there"
    with pytest.raises(TypeError, match="other is a list, expected a StepTable"):
        table.diff([1])
    assert table != "a table"
