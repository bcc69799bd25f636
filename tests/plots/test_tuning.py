"""plots.tuning_figure and plots.names_figure: what their axes show."""

import math
from dataclasses import replace

import pytest
from support.figure_contents import drawn

from ddpm_ext.plots import names_figure, tuning_figure
from ddpm_ext.plots.tuning import errors_by_name
from ddpm_ext.tables.samplers import SAMPLERS
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.tuning import Named, Report

pytest.importorskip("matplotlib")

ERRORS = {"unipc": {4: 0.2, 6: 0.1}, "ddim": {4: 0.4, 6: 0.3}, "plms": {4: 0.3, 6: math.inf}, "heun": {6: 0.05}}
OTHERS = {"standard_error": 0.01, "mean": 0.2, "median": 0.01}
NAMES = {
    calls: [
        Named(sampler=name, spacing="trailing", steps=calls, calls=calls, error=of[calls], **OTHERS)
        for name, of in ERRORS.items()
        if calls in of
    ]
    for calls in (4, 6)
}


def report(calls):
    names = sorted(NAMES[calls], key=lambda each: each.error)
    found = {"error": 0.1 / calls, "fitted": True, "fitted_error": 0.1 / calls, "names": names}
    by = {"teacher": "many", "teacher_error": 0.001, "seeds": 2, "held_out": 2}
    by |= {"model_calls": 99, "names_calls": 9, "batch": 2}
    return Report(calls=calls, timesteps=list(range(calls, 0, -1)), **found, **by, **OTHERS)


def test_the_longest_names_fit_in_the_picture():
    of_spacing = max(SPACINGS, key=len)
    by_length = sorted(SAMPLERS, key=len)[-6:]
    names = [
        Named(sampler=name, spacing=of_spacing, steps=4, calls=4, error=1 + i, **OTHERS)
        for i, name in enumerate(by_length)
    ]
    for figure in (names_figure({4: names}), tuning_figure([replace(report(4), names=names)])):
        (legend,) = figure.legends
        figure.draw_without_rendering()
        seen = legend.get_window_extent()
        assert seen.x0 >= 0 and seen.x1 <= figure.bbox.width and seen.y0 >= 0
        assert all(axes.get_window_extent().y0 > seen.y1 for axes in figure.axes)


def test_names_by_their_errors():
    """One that diverges, and one without a table for 4 calls, come last."""
    found = errors_by_name(NAMES)
    assert list(found) == [f"{name} with trailing" for name in ("unipc", "ddim", "plms", "heun")]
    assert found["ddim with trailing"] == {4: 0.4, 6: 0.3} and found["plms with trailing"] == {4: 0.3, 6: math.inf}
    curves = drawn(names_figure(NAMES).axes[0])
    assert curves["unipc with trailing"] == [[4, 0.2], [6, 0.1]]
    with pytest.raises(ValueError, match="names: got none"):
        names_figure({4: []})


@pytest.mark.parametrize("calls", [(6, 4), (6,)])
def test_tuned_tables_and_their_timesteps(calls, tmp_path):
    reports = [report(count) for count in calls]
    left, right = tuning_figure(reports, tmp_path / "tuned.png").axes
    assert drawn(left)["tuned"] == [[count, 0.1 / count] for count in sorted(calls)]
    assert drawn(left)["tuned, median"] == [[count, 0.01] for count in sorted(calls)]
    assert drawn(left)["best name"][-1] == [6, 0.05] and left.get_yscale() == "log"
    assert left.get_ylim()[0] < 0.1 / 6  # the lowest is seen
    shown = [line.get_xdata().tolist() for line in right.lines]
    assert shown == [list(range(count, 0, -1)) for count in sorted(calls)] and (tmp_path / "tuned.png").is_file()
