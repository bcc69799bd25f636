"""What all figures have in common: the same bytes for the same input, no state left behind, whole files or none."""

import sys

import pytest
import torch
from support.refused import refused

from ddpm_ext import StepTable, plots
from ddpm_ext.base.optional import MissingExtra

pytest.importorskip("matplotlib")

STEPS = {"timestep": [9, 5, 0], "a": [200, 3, 1], "b": [-200, -2, 0], "c0": [0.1, 0.5, 1], "c1": [0.9, 0.5, 0]}


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_same_input_same_bytes(ending, tmp_path):
    table = StepTable(**STEPS)
    for name in ("a", "b"):
        table.plot(tmp_path / (name + ending))
    first = (tmp_path / f"a{ending}").read_bytes()
    assert first == (tmp_path / f"b{ending}").read_bytes() and len(first) > 5000
    assert b"Software" not in first and b"CreationDate" not in first and b"<dc:date>" not in first


def test_no_state_is_left(tmp_path):
    """Nor a file, where a figure fails."""
    import matplotlib

    before, pyplot = dict(matplotlib.rcParams), sys.modules.get("matplotlib.pyplot")
    StepTable(**STEPS).plot()
    refused(ValueError, "xyz", StepTable(**STEPS).plot, tmp_path / "a.xyz")
    assert not list(tmp_path.iterdir())
    assert dict(matplotlib.rcParams) == before and sys.modules.get("matplotlib.pyplot") is pyplot


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    table = StepTable(**STEPS)
    for draw, purpose in (
        (table.plot, "a StepTable"),
        (lambda: plots.step_table_figure({"a": table, "b": table}), "step tables"),
        (lambda: plots.schedule_figure({"a": torch.ones(3)}), "schedules"),
        (lambda: plots.histogram_figure([torch.ones(4)] * 2, [1, 0]), "a histogram"),
    ):
        refused(MissingExtra, f"drawing {purpose} needs matplotlib: pip install", draw)
