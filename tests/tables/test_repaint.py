"""RePaint: the order of its steps, and the distributions, which no jump may change."""

from dataclasses import replace

import pytest
from support.choices import for_many

from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim, ddpm, repaint
from ddpm_ext.tables.schedules import make_betas
from ddpm_ext.tables.spacing import spaced_timesteps

BETAS = make_betas("linear", 1000)
LEVELS = (1 - BETAS).cumprod(0)


def make_table(rows, **options):
    return ddpm(make_grid(LEVELS, spaced_timesteps(1000, rows), betas=BETAS), **options)


def visited(rows, length, passes):
    """The times of RePaint, one level after the other: how many rows follow the next one, and -1 at the end.

    Lugmayr et al. 2022: from each time that is a multiple of `length`, with as many above it, up and down again.
    """
    highest = max(range(0, rows - length, length), default=0)
    times = [*range(rows - 1, highest - 1, -1)]
    for turn in range(highest, -1, -length):
        if turn + length < rows:
            times += [*range(turn + 1, turn + length + 1), *range(turn + length - 1, turn - 1, -1)] * (passes - 1)
        times += range(turn - 1, max(turn - length, 0) - 1, -1)
    return [*times, -1]


def is_jump(row):
    return row.signal_now > row.signal_after


@for_many(60)
def test_order_is_repaints(choose):
    rows, length, passes = choose.integer(1, 40), choose.integer(1, 12), choose.integer(1, 4)
    table = make_table(rows)
    repainted = repaint(table, jump_length=length, jump_n_sample=passes)
    times = [rows - 1]
    for row in repainted:
        at = rows - 1 - table.timestep.tolist().index(row.timestep)
        assert at == times[-1]
        if is_jump(row):
            times += range(at + 1, at + length + 1)
        else:
            assert row._replace(draw=0) == table[rows - 1 - at]._replace(draw=0)
            times.append(at - 1)
    assert times == visited(rows, length, passes)
    assert len(set(repainted.draw.tolist())) == len(repainted)


@for_many(30)
def test_jump_is_the_forward_process(choose):
    rows, length = choose.integer(3, 30), choose.integer(1, 5)
    table = repaint(make_table(rows, variance="learned_range"), jump_length=length, jump_n_sample=2)
    assert table.signal_now[1:].tolist() == table.signal_after[:-1].tolist()
    for row in filter(is_jump, table):
        assert row.a == row.b == row.c0 == row.c2 == row.l0 == row.l1 == row.g0 == row.g1 == 0
        assert row.c1**2 == pytest.approx(row.signal_after**2 / row.signal_now**2, rel=1e-14)
        assert row.c1**2 + row.s**2 == pytest.approx(1, rel=1e-14)


def test_other_tables():
    """Jumps can be added to any descending table, which keeps its columns. jump_n_sample = 1 changes nothing."""
    table = replace(ddim(make_grid(LEVELS, spaced_timesteps(1000, 12)), eta=0.5), notes={"clip": 1.0})
    assert repaint(table, jump_n_sample=1) == table
    before = [*table]
    jumping = repaint(table, jump_length=5, jump_n_sample=3)
    assert [*table] == before
    assert len(jumping) == 12 + 2 * 2 * 6 and jumping.notes == {"clip": 1.0}
