"""Step tables in files: every bit is preserved, and a file that is no table is refused."""

import json
import math

import pytest
from support.choices import for_many
from support.rows import any_rows, bits, changed, of

from ddpm_ext import StepTable
from ddpm_ext.tables.step_table import ADDED, COLUMNS


@for_many(60)
def test_files_preserve_every_bit(choose, tmp_path_factory):
    rows = any_rows(choose)
    path = tmp_path_factory.mktemp("tables") / "a.json"
    of(rows).save(path)
    loaded = StepTable.load(str(path))
    assert bits(loaded) == bits(rows)
    content = json.loads(path.read_text())
    assert (content["format"], content["version"]) == ("ddpm_ext.StepTable", 2)
    assert content["columns"] == list(COLUMNS)
    assert bits(content["rows"]) == bits(rows)
    assert sum(line.count("[") for line in path.read_text().splitlines()[5:-2]) == len(rows)  # one line a row
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]


def test_files_of_version_1_are_read(tmp_path):
    """They have no columns of the linear step."""
    path, table = tmp_path / "a.json", changed()
    table.save(path)
    content = json.loads(path.read_text())
    left_out = [content["columns"].index(name) for name in ("cu", "h1", "h2", "h3", "k0", "k1", "k2")]
    for row in (content["columns"], *content["rows"]):
        row[:] = [value for i, value in enumerate(row) if i not in left_out]
    path.write_text(json.dumps({**content, "version": 1}))
    assert StepTable.load(path) == table


def test_failed_save_leaves_the_old_file(tmp_path):
    path, table = tmp_path / "a.json", changed()
    table.save(path)
    broken = changed()
    broken.a[1] = math.nan
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.save(path)
    assert StepTable.load(path) == table
    with pytest.raises(ValueError, match="is a folder"):
        table.save(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"b\.json"):
        StepTable.load(tmp_path / "b.json")


def test_columns_in_another_order(tmp_path):
    changed(s=[0.5, 0.25, 0]).save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    for row in (content["columns"], *content["rows"]):
        row.reverse()
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert StepTable.load(tmp_path / "a.json") == changed(s=[0.5, 0.25, 0])


@for_many(20)
def test_files_with_fewer_columns(choose, tmp_path_factory):
    """Columns that an older file lacks are zeros."""
    rows = any_rows(choose)
    path = tmp_path_factory.mktemp("tables") / "a.json"
    of(rows).save(path)
    content = json.loads(path.read_text())
    left_out = [name for name in ADDED if choose.one_of([False, True])]
    for name in left_out:
        at = content["columns"].index(name)
        for row in (content["columns"], *content["rows"]):
            del row[at]
    path.write_text(json.dumps(content))
    zeros = dict.fromkeys(left_out, 0.0)
    assert bits(StepTable.load(path)) == bits(row._replace(**zeros) for row in rows)


def broken(**change):
    def apply(content):
        return json.dumps({**content, **change})

    return apply


def without(column):
    def apply(content):
        at = content["columns"].index(column)
        for row in (content["columns"], *content["rows"]):
            del row[at]
        return json.dumps(content)

    return apply


def cell(row, column, value):
    def apply(content):
        content["rows"][row][COLUMNS.index(column)] = value
        return json.dumps(content)

    return apply


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda content: json.dumps(content)[:-20], "is not JSON: "),
        (lambda content: "", "is not JSON: "),
        (lambda content: "[" * 100_000, "is not JSON: "),
        (lambda content: "\udcff", "is not JSON: .*utf"),
        (lambda content: "[1, 2]", "format is None, expected 'ddpm_ext.StepTable'"),
        (broken(format="onnx"), "format is 'onnx', expected 'ddpm_ext.StepTable'"),
        (broken(version=3), "version is 3, newer than this ddpm_ext, which reads up to 2"),
        (broken(version=0), "version is 0, expected an int from 1 to 2"),
        (broken(version=True), "version is True, expected an int"),
        (broken(version="1"), "version is '1', expected an int"),
        (without("s"), r"columns are \['timestep', 'a', 'b', 'c0', 'c1', 'c2', 'draw', .* expected timestep, a, b"),
        (broken(columns=[*COLUMNS[:-1], "noise"]), "columns are .*'noise'.*, expected .* each once"),
        (broken(columns=[*COLUMNS, "a"]), "columns are .*, each once"),
        (broken(columns=None), "columns are None"),
        (broken(rows=None), "rows are missing"),
        (broken(rows=[]), "rows are missing"),
        (broken(rows=[[1, 2]]), r"rows\[0\] is \[1, 2\], expected a list of 22 numbers"),
        (broken(rows=[{"a": 1}]), r"rows\[0\] is \{'a': 1\}"),
        (cell(1, "a", "x"), "a holds <U"),
        (cell(1, "b", None), "b holds NoneType"),
        (cell(1, "c0", True), "c0 holds a bool"),
        (cell(2, "c1", math.nan), r"c1\[2\] is nan, expected finite numbers"),
        (cell(2, "c1", [1]), "c1 is not 1-dimensional"),
        (cell(0, "draw", 1.5), "draw holds float64, expected integers"),
        (cell(0, "draw", -1), r"draw\[0\] is -1"),
        (cell(0, "l1", "x"), "l1 holds <U"),
        (cell(0, "now", 1.5), r"now\[0\] is 1.5, expected 0 <= now <= 1"),
    ],
)
def test_files_that_are_refused(change, message, tmp_path):
    path = tmp_path / "steps.json"
    changed().save(path)
    path.write_bytes(change(json.loads(path.read_text())).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as raised:
        StepTable.load(path)
    assert str(raised.value).startswith(str(path))
