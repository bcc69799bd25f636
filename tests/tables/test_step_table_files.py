"""Step tables in files: every bit is preserved, and a file that is no table is refused."""

import contextlib
import json
import math
import operator
import warnings
from dataclasses import replace

import pytest
import torch
from support.choices import for_many
from support.refused import refused
from support.rows import any_rows, bits, changed, of

from ddpm_ext import GaussianDiffusion, StepTable
from ddpm_ext.loop.options import LoopOptions
from ddpm_ext.loop.rows import make_loop_rows
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import SAMPLERS, ddim
from ddpm_ext.tables.step_table import ADDED, COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore:.*was a row lost or changed")  # of rows that are drawn


@for_many(60)
def test_files_preserve_every_bit(choose, tmp_path_factory):
    rows, path = any_rows(choose), tmp_path_factory.mktemp("tables") / "a.json"
    of(rows).save(path)
    assert bits(StepTable.load(str(path))) == bits(rows)
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("ddpm_ext.StepTable", 4)
    assert content["columns"] == list(COLUMNS) and bits(content["rows"]) == bits(rows)
    assert sum(line.count("[") for line in path.read_text().splitlines()[5:-2]) == len(rows)  # one line a row
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]


def test_failed_save_leaves_the_old_file(tmp_path):
    path, table, broken = tmp_path / "a.json", changed(), changed()
    table.save(path)
    broken.a[1] = math.nan
    refused(ValueError, "not JSON compliant", broken.save, path)
    assert StepTable.load(path) == table
    refused(ValueError, "is a folder", table.save, tmp_path)
    refused(FileNotFoundError, r"b\.json", StepTable.load, tmp_path / "b.json")


@for_many(20)
def test_files_with_fewer_columns_in_another_order(choose, tmp_path_factory):
    rows, path = any_rows(choose), tmp_path_factory.mktemp("tables") / "a.json"
    of(rows).save(path)
    content, left_out = json.loads(path.read_text()), [name for name in ADDED if choose.one_of([False, True])]
    kept = [i for i, name in enumerate(content["columns"]) if name not in left_out][:: choose.one_of([1, -1])]
    content["columns"], *content["rows"] = ([row[i] for i in kept] for row in (content["columns"], *content["rows"]))
    path.write_text(json.dumps(content))
    zeros = dict.fromkeys(left_out, 0.0)
    assert bits(StepTable.load(path)) == bits(row._replace(**zeros) for row in rows)


def broken(**change):
    return lambda content: json.dumps({**content, **change})


def without_s(content):
    at = content["columns"].index("s")
    for row in (content["columns"], *content["rows"]):
        del row[at]
    return json.dumps(content)


def cell(row, column, value):
    def apply(content):
        content["rows"][row][COLUMNS.index(column)] = value
        return json.dumps(content)

    return apply


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: json.dumps(content)[:-20], "is not JSON: "),
        (lambda content: "[" * 100_000, "is not JSON: "),
        (lambda content: "\udcff", "is not JSON: .*utf"),
        (lambda content: "[1, 2]", "format is None, expected 'ddpm_ext.StepTable'"),
        (broken(format="onnx"), "format is 'onnx', expected 'ddpm_ext.StepTable'"),
        (broken(version=5), "version is 5, expected 4"),
        (without_s, r"columns are \['timestep', 'a', 'b', 'c0', 'c1', 'c2', 'draw', .* expected timestep, a, b"),
        (broken(columns=[*COLUMNS[:-1], "noise"]), "columns are .*'noise'.*, expected .* each once"),
        (broken(rows=[]), "rows are missing"),
        (broken(rows=[[1, 2]]), r"rows\[0\] is \[1, 2\], expected a list of 23 numbers"),
        (cell(1, "a", "x"), "a holds <U"),
        (cell(0, "noise_now", -1.5), r"noise_now\[0\] is -1.5, expected noise_now >= 0"),
    ],
)
def test_files_that_are_refused(change, message, tmp_path):
    path = tmp_path / "steps.json"
    changed().save(path)
    path.write_bytes(change(json.loads(path.read_text())).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as raised:
        StepTable.load(path)
    assert str(raised.value).startswith(str(path))


def test_notes_stay_with_a_table(tmp_path):
    """In files, slices and copies; they are not compared."""
    table = changed(notes={"guidance": 2.5, "clip": (-1.0, 1.0), "model": None})
    table.save(tmp_path / "a.json")
    for kept in (table, StepTable.load(tmp_path / "a.json"), table[1:], replace(table, s=None), table.to("cpu")):
        assert kept.notes == {"guidance": 2.5, "clip": [-1.0, 1.0], "model": None}
    assert table == changed() and "\nguidance: 2.5\n" in repr(table)
    for wrong in ([1], {"guidance": torch.ones(1)}, {"clip": math.inf}):
        refused(TypeError, "notes are", changed, notes=wrong)


def test_a_file_whose_rows_do_not_lead_on_warns(tmp_path):
    path, whole = tmp_path / "a.json", ddim(make_grid(GaussianDiffusion(50).alphas_cumprod, [40, 20, 10, 0]))

    def edited(change):
        whole.save(path)
        content = json.loads(path.read_text())
        change(content["rows"], content["columns"].index("noise_now"))
        path.write_text(json.dumps(content))
        return path

    for change, message in (
        (lambda rows, noise: rows.pop(), "the last row arrives at noise"),
        (lambda rows, noise: rows.insert(2, rows[1]), "row 1 arrives at .*, and row 2 starts at"),
        (lambda rows, noise: operator.setitem(rows[2], noise, 0), "row 1 arrives at .*, and row 2 starts at"),
        (lambda rows, noise: operator.setitem(rows[0], noise, 0), "row 0 starts at noise 0"),
    ):
        with pytest.warns(UserWarning, match=f"a.json: {message}"):
            StepTable.load(edited(change))


def test_no_named_sampler_warns(tmp_path):
    for name in SAMPLERS:
        for gd in (GaussianDiffusion(1000), GaussianDiffusion(1000, "flow", prediction="flow")):
            with contextlib.suppress(TypeError, ValueError):  # of another kind of schedule
                table = make_loop_rows(gd, LoopOptions(sampler=name, steps=6)).table
                table.save(tmp_path / "a.json")
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    assert StepTable.load(tmp_path / "a.json") == table
