"""Random rows for a StepTable, and the bits of a table's numbers."""

import math
import struct

from ddpm_ext import StepTable
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.step_table import ADDED, COLUMNS, FACTORS, StepRow

SMALL = {"timestep": [2, 1, 0], "a": [1, 2, 3], "b": [0.5] * 3, "c0": [1, 0, 1], "c1": [0, 1, 0]}


def any_float(choose):
    """A random finite float64. Its bits are random, so it may have any size."""
    (value,) = struct.unpack("<d", struct.pack("<q", choose.integer(-(2**63), 2**63 - 1)))
    return value if math.isfinite(value) else choose.one_of([0.0, -0.0, 0.1, 5e-324, -1.7976931348623157e308])


def any_rows(choose, most=14):
    """At most `most` random StepRows. Their timesteps are all ints or all floats."""
    step = choose.one_of([lambda: choose.integer(-(2**63), 2**63 - 1), lambda: any_float(choose)])
    rows = []
    for _ in range(choose.integer(1, most)):
        factors = {name: any_float(choose) for name in (*FACTORS, *ADDED)}
        levels = {name: abs(any_float(choose)) for name in LEVELS}
        rows.append(StepRow(timestep=step(), draw=choose.integer(0, 2**32 - 1), **{**factors, **levels}))
    return rows


def of(rows):
    """The StepTable with these rows."""
    return StepTable(**dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))


def bits(rows):
    """The rows with each float as its bytes, so that 0.0 differs from -0.0, and 1 from 1.0."""
    return [[struct.pack("<d", value) if isinstance(value, float) else value for value in row] for row in rows]


def changed(**columns):
    """A StepTable of three rows, in which these columns replace those of SMALL."""
    return StepTable(**{**SMALL, **columns})
