"""Step tables in files: every bit is preserved, and a file that is no table is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.choices import for_many
from support.refused import refused
from support.rows import any_rows, bits, changed, of

from ddpm_ext import StepTable
from ddpm_ext.tables.levels import LEVELS
from ddpm_ext.tables.step_table import ADDED, COLUMNS


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


NEWER = ("cu", "h1", "h2", "h3", "k0", "k1", "k2")


@pytest.mark.parametrize(("version", "left_out"), [(1, NEWER), (2, ())])
@pytest.mark.parametrize("levels", [[(0.0, 0.0), (0.25, 0.75), (0.75, 1.0)], [(0.0, 0.0)] * 3], ids=["known", "none"])
def test_files_of_older_versions_are_read(tmp_path, version, left_out, levels):
    """Their levels are alphas_cumprod, in two columns, which are all 0 where no level is known."""
    columns = [name for name in COLUMNS if name not in (*LEVELS, *left_out)]
    rows = [[*(getattr(row, name) for name in columns), *pair] for row, pair in zip(changed(), levels, strict=True)]
    content = {"format": "ddpm_ext.StepTable", "version": version, "columns": [*columns, "now", "after"], "rows": rows}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    expected = {}
    for name, powers in zip(("now", "after"), zip(*levels, strict=True), strict=True):
        if any(powers):
            expected[f"signal_{name}"] = [math.sqrt(power) for power in powers]
            expected[f"noise_{name}"] = [math.sqrt(1 - power) for power in powers]
    assert StepTable.load(path) == changed(**expected)
    rows[1][-1] = 1.5
    path.write_text(json.dumps(content))
    refused(ValueError, r"a.json: after holds .*1.5.*, expected 0 <= after <= 1", StepTable.load, path)


def with_c3(path, c3, **columns):
    """A file of version 3, whose c3 is the factor of the x0 of the row before."""
    changed(**columns).save(path)
    content = json.loads(path.read_text())
    content |= {"version": 3, "columns": [*content["columns"], "c3"]}
    content["rows"] = [[*row, factor] for row, factor in zip(content["rows"], c3, strict=True)]
    path.write_text(json.dumps(content))
    return path


def test_files_with_the_x0_of_the_row_before_are_read(tmp_path):
    """It becomes h1, and the row before keeps its x0."""
    path = tmp_path / "a.json"
    for c3, k0 in (([0, 0.5, 0], [1, 0, 0]), ([0, -1, 2.5], [1, 1, 0]), ([2, 0, 0], [0, 0, 0])):
        assert StepTable.load(with_c3(path, c3, cu=[0, 0, 1])) == changed(h1=c3, k0=k0, cu=[0, 0, 1])
    assert StepTable.load(with_c3(path, [0, 0, 0], h2=[0, 0, 1], k1=[1, 1, 1])) == changed(h2=[0, 0, 1], k1=[1, 1, 1])
    refused(ValueError, r"a.json: c3\[2\] is 0.5, but the row", StepTable.load, with_c3(path, [0, 0, 0.5], b=[1, 0, 1]))
    for name in NEWER[1:]:
        with pytest.raises(ValueError, match=f"a.json: c3 and {name} are not 0, so that"):
            StepTable.load(with_c3(path, [0, 0, 0.5], **{name: [0, 1, 0]}))


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
        (broken(version=5), "version is 5, newer than this ddpm_ext, which reads up to 4"),
        (broken(version=0), "version is 0, expected an int from 1 to 4"),
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
