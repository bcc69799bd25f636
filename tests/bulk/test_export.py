"""The .npz and the folder of pictures that a run's samples are exported to."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from support import exact_run
from support.exact_run import COUNT

from ddpm_ext.base import files
from ddpm_ext.bulk.export import write_npz, write_pngs
from ddpm_ext.bulk.run import sample_many
from ddpm_ext.bulk.shards import Shards


def test_npz_is_that_of_numpy(tmp_path, truth):
    shards, _ = exact_run.run(tmp_path / "run")
    expected = io.BytesIO()
    np.savez(expected, truth)
    write_npz(shards, tmp_path / "new" / "a.npz")
    with zipfile.ZipFile(tmp_path / "new" / "a.npz") as ours, zipfile.ZipFile(expected) as theirs:
        assert ours.namelist() == theirs.namelist() == ["arr_0.npy"]
        assert ours.read("arr_0.npy") == theirs.read("arr_0.npy") and ours.testzip() is None
        assert ours.infolist()[0].date_time[0] == 1980  # the file does not depend on the time of the run
    with np.load(tmp_path / "new" / "a.npz") as opened:
        assert np.array_equal(opened["arr_0"], truth)


def test_npz_needs_the_memory_of_a_shard(tmp_path):
    shards = Shards(tmp_path, 40, 1, (512, 512, 3))
    (tmp_path / "shards").mkdir()
    for index in range(len(shards)):
        shards.write(index, np.full((1, *shards.shape), index, np.uint8))
    tracemalloc.start()
    try:
        write_npz(shards, tmp_path / "a.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 40 * 512 * 512 * 3 and peak < 4 * 512 * 512 * 3


def test_an_error_does_not_name_the_hidden_folder(tmp_path):
    shards, _ = exact_run.run(tmp_path / "run")
    with pytest.raises(FileNotFoundError) as info:
        write_pngs(shards, tmp_path / "none" / "png")
    assert info.value.filename == str(tmp_path / "none" / "png")


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    shards, _ = exact_run.run(tmp_path / "run")
    pytest.importorskip("PIL.Image")
    npz, png = tmp_path / "a.b.npz", tmp_path / "png"
    with files.atomic_path(npz) as beside:
        beside.touch()
    beside.write_bytes(b"torn")
    (tmp_path / ".png.01234567").mkdir()
    (tmp_path / ".png.01234567" / "000000.png").touch()
    (tmp_path / ".a.c.01234567.npz").touch()  # the leftover of another file
    write_npz(shards, npz)
    write_pngs(shards, png)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.c.01234567.npz", "a.b.npz", "png", "run"]


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs(tmp_path, channels):
    image, shards = pytest.importorskip("PIL.Image"), Shards(tmp_path, 7, 3, (4, 5, channels))
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, channels), dtype=np.uint8)
    sample_many(shards, {}, lambda first, count: images[first : first + count], batch_size=2)
    write_pngs(shards, tmp_path / "png")
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [f"{i:06d}.png" for i in range(7)]
    for i in range(7):
        with image.open(tmp_path / "png" / f"{i:06d}.png") as opened:
            assert opened.format == "PNG" and np.array_equal(np.asarray(opened).reshape(4, 5, channels), images[i])


def test_png_folder_is_whole_or_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    shards, _ = exact_run.run(tmp_path)
    write_pngs(shards, tmp_path / "png")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "png").iterdir()}
    write_pngs(shards, tmp_path / "png")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "png").iterdir()} == before
    (tmp_path / "png" / "000003.png").unlink()
    with pytest.raises(ValueError, match=f"png has {COUNT - 1} pictures, expected the {COUNT} from"):
        write_pngs(shards, tmp_path / "png")
    with pytest.raises(ValueError, match="samples of 2 channels, expected 1 or 3"):
        write_pngs(Shards(tmp_path, 1, 1, (4, 5, 2)), tmp_path / "other")

    def full(*arguments):
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match=r"disk full.*other'$"):
        patch.setattr(image.Image, "save", full)
        write_pngs(shards, tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))
