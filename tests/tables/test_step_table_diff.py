"""The differences of two step tables, against Python's own numbers."""

import math
from fractions import Fraction

import pytest
from support.choices import for_many
from support.rows import any_float, any_rows, changed, of

from ddpm_ext import StepTable
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.step_table import ADDED, COLUMNS, FACTORS


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
