"""ddpm_ext.many: the same samples for every batch size and number of ranks, killed or not; the files they end in."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support import exact_run
from support.exact_run import COUNT, SHAPE, SIZE, make_draw

from ddpm_ext import Philox, randn
from ddpm_ext.base import files
from ddpm_ext.base import ranks as distributed
from ddpm_ext.base.ranks import Ranks
from ddpm_ext.bulk import run as many
from ddpm_ext.ops.noise import STREAM_START

SCRIPT = Path(exact_run.__file__)
PATH = os.pathsep.join(path for path in sys.path if path)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}


@pytest.fixture(scope="module")
def truth():
    """All samples in one batch"""
    return make_draw()(0, COUNT)


def contents(folder):
    """Every file in a folder but the manifest, with its bytes"""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del found["manifest.json"]
    return found


def joined(shards):
    return np.concatenate(list(shards.images()))


# ---------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("size", [4, 6, 100])
def test_neither_batches_nor_shards_matter(tmp_path, truth, batch_size, size):
    seen = []
    shards, work = exact_run.run(tmp_path, size=size, batch_size=batch_size, seen=seen)
    assert work.drawn == COUNT
    assert np.array_equal(joined(shards), truth)
    start = np.concatenate([np.asarray(noise) for noise in seen])
    assert start.tobytes() == randn(start.shape, Philox(0), stream=STREAM_START).numpy().tobytes()
    assert max(map(len, seen)) == min(batch_size, size)


def test_shards(tmp_path):
    shards = many.Shards(tmp_path, COUNT, SIZE, SHAPE)
    assert len(shards) == 6
    assert [i for index in range(6) for i in shards.ids(index)] == list(range(COUNT))
    assert shards.path(1) == tmp_path / "shards" / "000000004-000000007.npy"
    assert shards.path(5).name == "000000020-000000022.npy"
    assert shards.missing() == list(range(6))


def test_what_is_there_is_not_drawn_again(tmp_path, truth):
    shards, _ = exact_run.run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    gone = [shards.path(1), shards.path(5)]
    for path in gone:
        path.unlink()
    shards, work = exact_run.run(tmp_path, batch_size=2)
    assert work.drawn == 4 + 3
    assert np.array_equal(joined(shards), truth)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert {path for path in after if after[path] == before[path]} == before.keys() - gone
    assert exact_run.run(tmp_path)[1].drawn == 0


def test_torn_files_are_ignored_and_removed(tmp_path, truth):
    exact_run.run(tmp_path)
    whole = contents(tmp_path)
    torn = many.Shards(tmp_path, COUNT, SIZE, SHAPE).path(2)
    content = torn.read_bytes()
    torn.unlink()
    with pytest.raises(FileNotFoundError), files.atomic_path(torn) as beside:  # its own name of the file beside
        beside.touch()
        beside.unlink()
    beside.write_bytes(content[:-50])
    shards, work = exact_run.run(tmp_path)
    assert work.drawn == 4
    assert contents(tmp_path) == whole
    assert np.array_equal(joined(shards), truth)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", "short", "other"])
def test_damaged_shard_is_told_before_the_work(tmp_path, content):
    shards, _ = exact_run.run(tmp_path)
    path = shards.path(3)
    if content == "short":
        content = path.read_bytes()[:-1]
    if content == "other":
        np.save(path, np.zeros((4, *SHAPE), np.float32))
    else:
        path.write_bytes(content)
    shards.path(0).unlink()
    with pytest.raises(ValueError, match=r"out: .*000000012-000000015.npy (is damaged|holds float32)"):
        exact_run.run(tmp_path)
    assert not shards.path(0).exists()


def test_other_settings_are_refused_by_name(tmp_path):
    settings = {"seed": 0, "eta": 0.5, "sampler": "ddim"}
    exact_run.run(tmp_path, settings=settings)
    before = contents(tmp_path), (tmp_path / "manifest.json").read_bytes()
    assert exact_run.run(tmp_path, settings=dict(settings))[1].drawn == 0
    changes = [
        ({"seed": 1}, {}, "seed is 0 there and 1 here"),
        ({"eta": None}, {}, "eta is 0.5 there and None here"),
        ({"spacing": "leading"}, {}, "spacing is None there and leading here"),
        ({"sampler": "ddpm", "seed": 2}, {}, "seed is 0 there and 2 here; sampler is ddim there and ddpm here"),
        ({}, {"count": COUNT + 1}, f"num_images is {COUNT} there and {COUNT + 1} here"),
        ({}, {"size": 5}, "shard_size is 4 there and 5 here"),
    ]
    for change, options, message in changes:
        with pytest.raises(ValueError, match=f"samples of other settings: {message}; expected another folder"):
            exact_run.run(tmp_path, settings=settings | change, **options)
    assert (contents(tmp_path), (tmp_path / "manifest.json").read_bytes()) == before


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out: .*file is a file"):
        exact_run.run(tmp_path / "file")
    (tmp_path / "a" / "shards").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has shards but no manifest\.json"):
        exact_run.run(tmp_path / "a")
    for content, message in (
        ("{", "is no manifest of samples"),
        ("[]", "is no manifest of samples"),
        ('{"format": "2", "settings": {}}', "has format '2', expected 'ddpm-ext samples 1'"),
    ):
        (tmp_path / "a" / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            exact_run.run(tmp_path / "a")


def test_manifest_comes_first_and_says_what(tmp_path):
    def draw(first, count):
        raise RuntimeError("drawing begins")

    shards = many.Shards(tmp_path / "new" / "folder", COUNT, SIZE, SHAPE)
    with pytest.raises(RuntimeError, match="drawing begins"):
        many.sample_many(shards, {"seed": 2**64 - 1}, draw, batch_size=1, about={"model": "mine"})
    found = json.loads((shards.folder / "manifest.json").read_text())
    expected = {"seed": 2**64 - 1, "num_images": COUNT, "shard_size": SIZE, "shape": list(SHAPE)}
    assert (found["settings"], found["about"]) == (expected, {"model": "mine"})


@pytest.mark.parametrize("given", [np.zeros((1, *SHAPE)), np.zeros((3, 4, 5, 1), np.uint8)])
def test_draw_must_give_what_the_shards_hold(tmp_path, given):
    shards = many.Shards(tmp_path, 3, SIZE, SHAPE)
    with pytest.raises(ValueError, match=r"draw gave (float64|uint8) of .*, expected uint8 of shape \(3, 4, 5, 3\)"):
        many.sample_many(shards, {}, lambda first, count: given, batch_size=3)
    assert not list((tmp_path / "shards").iterdir())


def test_shard_is_whole_or_not_there(tmp_path, monkeypatch, truth):
    def half(path, images):
        Path(path).write_bytes(images.tobytes()[:100])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(np, "save", half)
        exact_run.run(tmp_path)
    assert not list((tmp_path / "shards").iterdir())
    assert np.array_equal(joined(exact_run.run(tmp_path)[0]), truth)


def test_one_run_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    shards = many.Shards(tmp_path, COUNT, SIZE, SHAPE)
    messages = []

    def draw(first, count):
        if not messages:
            with pytest.raises(ValueError) as caught:
                exact_run.run(tmp_path)
            messages.append(str(caught.value))
        return make_draw()(first, count)

    many.sample_many(shards, {"seed": 0}, draw, batch_size=2)
    assert messages == [f"out: another run is at work in {tmp_path}"]
    assert exact_run.run(tmp_path)[1].drawn == 0  # the lock went with the run


def test_bar_counts_samples(tmp_path, capsys):
    pytest.importorskip("tqdm")
    shards, _ = exact_run.run(tmp_path)
    shards.path(0).unlink()
    many.sample_many(shards, {"seed": 0}, make_draw(), batch_size=2, progress=True)
    shown = capsys.readouterr().err
    assert f"19/{COUNT}" in shown
    assert f"{COUNT}/{COUNT}" in shown


# ---------------------------------------------------------------------------------------------- files


def test_npz_is_that_of_numpy(tmp_path, truth):
    shards, _ = exact_run.run(tmp_path / "run")
    expected = io.BytesIO()
    np.savez(expected, truth)
    many.write_npz(shards, tmp_path / "new" / "a.npz")
    with zipfile.ZipFile(tmp_path / "new" / "a.npz") as ours, zipfile.ZipFile(expected) as theirs:
        assert ours.namelist() == theirs.namelist() == ["arr_0.npy"]
        assert ours.read("arr_0.npy") == theirs.read("arr_0.npy")
        assert ours.testzip() is None
        assert ours.infolist()[0].date_time[0] == 1980  # nothing that differs from run to run
    with np.load(tmp_path / "new" / "a.npz") as opened:
        assert np.array_equal(opened["arr_0"], truth)


def test_npz_takes_a_shard_of_memory(tmp_path):
    shards = many.Shards(tmp_path, 40, 1, (512, 512, 3))
    (tmp_path / "shards").mkdir()
    for index in range(len(shards)):
        shards.write(index, np.full((1, *shards.shape), index, np.uint8))
    tracemalloc.start()
    try:
        many.write_npz(shards, tmp_path / "a.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 40 * 512 * 512 * 3
    assert peak < 4 * 512 * 512 * 3


def test_what_a_killed_writer_left_goes(tmp_path):
    shards, _ = exact_run.run(tmp_path / "run")
    pytest.importorskip("PIL.Image")
    npz, png = tmp_path / "a.b.npz", tmp_path / "png"
    with files.atomic_path(npz) as beside:
        beside.touch()
    beside.write_bytes(b"torn")
    (tmp_path / ".png.01234567").mkdir()
    (tmp_path / ".png.01234567" / "000000.png").touch()
    (tmp_path / ".a.c.01234567.npz").touch()  # another file's
    many.write_npz(shards, npz)
    many.write_pngs(shards, png)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.c.01234567.npz", "a.b.npz", "png", "run"]


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs(tmp_path, channels):
    image = pytest.importorskip("PIL.Image")
    shards = many.Shards(tmp_path, 7, 3, (4, 5, channels))
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, channels), dtype=np.uint8)
    many.sample_many(shards, {}, lambda first, count: images[first : first + count], batch_size=2)
    many.write_pngs(shards, tmp_path / "png")
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [f"{i:06d}.png" for i in range(7)]
    for i in range(7):
        with image.open(tmp_path / "png" / f"{i:06d}.png") as opened:
            assert opened.format == "PNG"
            assert np.array_equal(np.asarray(opened).reshape(4, 5, channels), images[i])


def test_png_folder_is_whole_or_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    shards, _ = exact_run.run(tmp_path)
    many.write_pngs(shards, tmp_path / "png")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "png").iterdir()}
    many.write_pngs(shards, tmp_path / "png")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "png").iterdir()} == before
    (tmp_path / "png" / "000003.png").unlink()
    with pytest.raises(ValueError, match=f"png has {COUNT - 1} pictures, expected {COUNT}"):
        many.write_pngs(shards, tmp_path / "png")
    with pytest.raises(ValueError, match="samples of 2 channels, expected 1 or 3"):
        many.write_pngs(many.Shards(tmp_path, 1, 1, (4, 5, 2)), tmp_path / "other")

    def full(*arguments):
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(image.Image, "save", full)
        many.write_pngs(shards, tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))


# ---------------------------------------------------------------------------------------------- several ranks


def start(folder, size, **options):
    """One process a rank, as a launcher other than torchrun would start them"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), json.dumps(options)],
            env=ENVIRONMENT
            | {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ends(processes, timeout=120):
    """Exit code and standard error of each; none may hang"""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(("size", "batch_size"), [(2, 1), (3, 7)])
def test_torchrun_gives_the_same_files(tmp_path, size, batch_size):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command = [*launcher, str(SCRIPT), str(tmp_path / "many"), json.dumps({"batch_size": batch_size})]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.count("done")) == (0, size), done.stderr
    exact_run.run(tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert (tmp_path / "many" / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_the_others_and_the_next_run_goes_on(tmp_path, killed):
    folder = tmp_path / "run"
    processes = start(folder, 2, batch_size=1, pause=0.1)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shards/0*.npy"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[killed].send_signal(signal.SIGKILL)
    ended = ends(processes)
    assert ended[killed][0] == -signal.SIGKILL
    code, error = ended[1 - killed]
    assert code == 1
    assert "another rank ended before the work was done" in error
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shards/0*.npy")}
    assert 2 <= len(before) < 6
    shards, work = exact_run.run(folder)  # alone this time
    assert work.drawn == COUNT - sum(len(shards.ids(i)) for i in range(6) if shards.path(i) in before)
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    exact_run.run(tmp_path / "one")
    assert contents(folder) == contents(tmp_path / "one")


def test_ranks_with_folders_of_their_own_are_told(tmp_path):
    other = {"1": {"folder": str(tmp_path / "other")}}
    ended = ends(start(tmp_path / "run", 2, _VISIBLE_WITHIN=0.3, **{"by rank": other}))
    assert [code for code, _ in ended] == [1, 1]
    assert f"another rank wrote {tmp_path / 'other' / 'manifest.json'}, but here it is not" in ended[1][1]
    assert "another rank ended" in ended[0][1]


def test_stuck_rank_is_told(tmp_path):
    processes = start(tmp_path, 2, _PATIENCE=0.5, **{"by rank": {"1": {"pause": 1000}}})
    assert "a rank is stuck" in processes[0].communicate(timeout=120)[1]
    assert processes[0].returncode == 1
    assert len(list(tmp_path.glob("shards/0*.npy"))) == 3  # rank 0's
    processes[1].kill()
    processes[1].communicate()


def test_what_rank_0_refuses_ends_all(tmp_path):
    exact_run.run(tmp_path)
    ended = ends(start(tmp_path, 2, seed=5))
    assert [code for code, _ in ended] == [1, 2]  # a traceback in this script; nothing from rank 1
    assert "seed is 0 there and 5 here" in ended[0][1]
    assert "seed" not in ended[1][1]


def test_place_by_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.ranks() == Ranks(0, 1, 0)
    for values, expected in (
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, Ranks(5, 8, 1)),
        ({"WORLD_SIZE": "8", "RANK": "5"}, Ranks(5, 8, 5)),
    ):
        with monkeypatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            assert distributed.ranks() == expected
    for values, message in (
        ({"WORLD_SIZE": "2"}, r"RANK: got nothing in the environment, expected a whole number in \[0, 2\)"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: got 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: got 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got two"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK: got -1"),
    ):
        with monkeypatch.context() as patch:
            for name, value in values.items():
                patch.setenv(name, value)
            with pytest.raises(ValueError, match=message):
                distributed.ranks()


def test_each_rank_has_its_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [Ranks(rank, 4, rank).device("cuda") for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Ranks(3, 4, 3).device("cuda:0") == "cuda:0"
    assert Ranks(3, 4, 3).device("cpu") == "cpu"
    assert Ranks().device("cuda") == "cuda"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert Ranks(1, 2, 1).device("cuda") == "cuda"  # which is refused with a reason where it is used
