"""plots.step_table_figure: what is in the axes of one step table and of several."""

import pytest
from support.figure_contents import drawn, legend, looks, points
from support.refused import refused

from ddpm_ext import StepTable
from ddpm_ext.plots.step_tables import step_table_figure

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

COLUMNS = ("timestep", "a", "b", "c0", "c1", "c2", "s")
STEPS = {"timestep": [9, 5, 0], "a": [200, 3, 1], "b": [-200, -2, 0], "c0": [0.1, 0.5, 1], "c1": [0.9, 0.5, 0]}


def test_step_table_draws_every_column():
    """A sampler without noise has no panel for it; one table by its name is drawn as such."""
    table = StepTable(**STEPS, c2=[0, -0.5, 0], s=[0.5, 0.25, 0])
    figure = table.plot(name="mine")
    assert figure.get_suptitle() == "mine, 3 rows"
    found = {}
    for axes in figure.axes:
        assert axes.get_title() and axes.get_ylabel()
        lines = drawn(axes)
        found |= lines
        assert len(set(map(str, looks(axes)))) == len(lines)
        if len(lines) > 1:
            assert legend(axes) == list(lines)
        assert axes.get_yscale() == ("asinh" if "a" in lines else "linear")
    assert found == {name: points(range(3), getattr(table, name)) for name in COLUMNS}
    assert "exp(l0 + l1 v)" in StepTable(**STEPS, s=[1, 1, 0], l1=[0.5] * 3).plot().axes[2].get_title()
    plain = step_table_figure({"ddim": StepTable(**STEPS)})
    assert len([axes for axes in plain.axes if axes.lines]) == 3 and plain.get_suptitle() == "ddim, 3 rows"


HISTORY = {"cu": [0, 0.1, 0], "h1": [0, -0.5, 0.2], "h2": [0, 0, 0.1], "k0": [1, 1, 0], "k2": [0, 0, 3]}


def test_history_has_panels_of_its_own():
    """Of one table by what they are for, of several each column."""
    plain, linear = StepTable(**STEPS), StepTable(**STEPS, **HISTORY)
    following, read, kept = linear.plot().axes[1:4]
    assert legend(following) == ["c0", "c1", "cu"]  # c2 is 0
    for axes, names in ((read, ("h1", "h2")), (kept, ("k0", "k2"))):
        assert drawn(axes) == {name: points(range(3), HISTORY[name]) for name in names}
    figure = step_table_figure({"plain": plain, "linear": linear})
    shown = {axes.get_title().split(",")[0]: drawn(axes) for axes in figure.axes if axes.lines}
    assert HISTORY.keys() <= shown.keys() and not {"h3", "k1"} & shown.keys()
    for name in HISTORY:
        assert shown[name] == {"plain": points(range(3), [0] * 3), "linear": points(range(3), HISTORY[name])}


def test_a_panel_for_each_table():
    tables = {
        "noisy": StepTable(**STEPS, s=[0.5, 0.25, 0]),
        "linear": StepTable(**STEPS, **HISTORY)[:2],
        "nothing": StepTable(timestep=[0], a=[1], b=[1], c0=[0], c1=[0]),
    }
    for against in ("step", "timestep"):
        figure = step_table_figure(tables, panels="tables", against=against)
        expected = (("c0", "c1", "s"), ("c0", "c1", "h1", "cu"), ("c0",))
        for axes, (label, table), names in zip(figure.axes, tables.items(), expected, strict=False):
            across = range(len(table)) if against == "step" else table.timestep
            assert axes.get_title() == label
            assert drawn(axes) == {name: points(across, getattr(table, name)) for name in names}
        (found,) = figure.legends
        assert legend(found) == ["c0 x0", "c1 x", "s z", "h1 H1", "cu u"]
        first, second = (dict(zip(drawn(axes), looks(axes), strict=True)) for axes in figure.axes[:2])
        assert first["c1"] == second["c1"] and len({*map(str, (first | second).values())}) == 5


def test_several_tables_have_a_panel_a_column():
    tables = {
        "long": StepTable(**STEPS, s=[0.5, 0.25, 0]),
        "short": StepTable(timestep=[7.5, 0], a=[30, 1], b=[-30, 0], c0=[0.5, 1], c1=[0, 0]),
    }
    names = ("a", "b", "c0", "c1", "s", "timestep")  # c2 and h1 are 0 in both
    for against, last in (("step", "timestep"), ("timestep", "step")):
        figure = step_table_figure(tables, against=against)
        assert len(figure.axes) == 6
        for axes, name in zip(figure.axes, (*names[:-1], last), strict=True):
            expected = {}
            for label, table in tables.items():
                across = range(len(table)) if against == "step" else table.timestep
                expected[label] = points(across, range(len(table)) if name == "step" else getattr(table, name))
            assert drawn(axes) == expected and (axes.get_title().split(",")[0] == name or name in ("timestep", "step"))
            assert axes.get_yscale() == ("asinh" if name in "ab" else "linear")
            assert len(set(map(str, looks(axes)))) == 2
            left, right = axes.get_xlim()
            assert (left > right) == (against == "timestep")  # from noise to sample
        (found,) = figure.legends
        assert legend(found) == list(tables)
    nothing = StepTable(timestep=[0], a=[0], b=[0], c0=[0], c1=[0])
    assert any(axes.lines for axes in step_table_figure(nothing, against="timestep").axes)
    first = StepTable(**STEPS, c2=[0.1, 0, 0], s=[1, 0, 0])  # seven panels, so that the legend takes the eighth place
    figure = step_table_figure({"one": first, "two": first[:2]})
    assert legend(figure.axes[-1]) == ["one", "two"] and not figure.legends


def test_step_tables_bad_input():
    table = StepTable(**STEPS)
    for tables, options, message in (
        ({}, {}, "tables: got none"),
        ({"x": 3}, {}, r"tables\['x'\] is a int, expected a StepTable"),
        ([table], {}, "tables is a list"),
        (table, {"against": "row"}, "against is 'row', expected 'step' or 'timestep'"),
        ({"x": table}, {"panels": "rows"}, "panels is 'rows', expected 'columns' or 'tables'"),
    ):
        refused((TypeError, ValueError), message, step_table_figure, tables, **options)
