"""A run of several processes writes the same files as one, even if a process is killed on the way."""

import json
import os
import signal
import subprocess
import sys
from itertools import chain

import pytest
from support import exact_run, forks
from support.choices import for_many
from support.command_line import ENVIRONMENT
from support.exact_run import COUNT, contents
from support.forks import said

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
KILLED = {"batch_size": 1, "die_at": (1, 2)}  # the other has drawn, too


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Runs of several ranks by name: the folder, and the exit codes."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("other seed", "killed 1"):
        (folder / name).mkdir()
    exact_run.run(folder / "other seed" / "run")
    exact_run.run(folder / "killed 1" / "run", count=6)  # a shard and a half, from which the ranks go on
    runs = {
        "killed 0": [KILLED, {"batch_size": 1}],
        "killed 1": [{"batch_size": 1}, KILLED | {"die_at": (1, 3)}],
        "other folder": [{"visible_within": 0.3}, {"visible_within": 0.3, "elsewhere": str(folder / "elsewhere")}],
        "stuck": [{"patience": 0.5}, {"patience": 0.5, "pause": 1000, "stuck": True}],
        "other seed": [{"seed": 5}] * 2,
    }
    codes = forks.in_forks(exact_run.__file__, folder, runs)
    return {name: (folder / name, codes[name]) for name in runs}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one")
    exact_run.run(folder)
    return folder


def check_same(folder, one):
    assert contents(folder) == contents(one)
    assert (folder / "manifest.json").read_bytes() == (one / "manifest.json").read_bytes()


def test_torchrun_gives_the_same_files(tmp_path, one):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command = [*launcher, exact_run.__file__, str(tmp_path / "many"), json.dumps({"batch_size": 7})]
    without = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in without}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.count("done")) == (0, 3), done.stderr
    check_same(tmp_path / "many", one)


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_the_others_and_the_next_run_goes_on(ended, one, killed):
    folder, codes = ended[f"killed {killed}"]
    assert (codes[killed], codes[1 - killed]) == (-signal.SIGKILL, 1)
    assert "another rank ended before the work was done" in said(folder, 1 - killed)
    folder = folder / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shards/0*.npy")}
    assert 2 <= len(before) < 6
    shards, result = exact_run.run(folder)  # in one process
    assert result.drawn == COUNT - sum(len(shards.ids(i)) for i in range(6) if shards.path(i) in before)
    assert all(path.stat().st_mtime_ns == time_before for path, time_before in before.items())
    check_same(folder, one)


@pytest.mark.slow
@for_many(1)
def test_ranks_that_are_killed_at_any_time(tmp_path_factory, one, choose):
    """Run after run in one folder, each of other ranks; the last one, which nobody kills, has what is still missing."""
    folder = tmp_path_factory.mktemp("killed")

    def rank():
        options = {"batch_size": choose.one_of([1, 3, 4], "batch size"), "pause": 0.01}
        return options | {"die_after": choose.integer(1, 1500, "ms") / 1000, "elsewhere": str(folder / "all")}

    runs = {f"killed {i}": choose.several(rank, 1, 3, "ranks") for i in range(4)}
    runs["last"] = [{"elsewhere": str(folder / "all")}] * 2
    codes = forks.in_forks(exact_run.__file__, folder, runs)
    assert codes["last"] == [0, 0] and {*chain(*codes.values())} <= {0, 1, 2, -signal.SIGALRM}
    assert not any("Traceback" in path.read_text() for path in folder.glob("*/*.err"))
    check_same(folder / "all", one)


def test_ranks_that_do_not_share_a_folder_are_refused(ended):
    folder, codes = ended["other folder"]
    assert codes == [1, 1]
    elsewhere = folder.parent / "elsewhere" / "manifest.json"
    assert f"another rank wrote {elsewhere}, but here it is not" in said(folder, 1)
    assert "another rank ended" in said(folder, 0)


def test_stuck_rank_is_reported(ended):
    folder, codes = ended["stuck"]
    assert codes == [1, -signal.SIGKILL] and "a rank is stuck" in said(folder, 0)
    assert len(list(folder.glob("run/shards/0*.npy"))) == 3  # those of rank 0


def test_an_error_of_rank_0_ends_all(ended):
    folder, codes = ended["other seed"]
    assert codes == [1, 2]  # rank 0 ends with a message, rank 1 without
    assert "seed is 0 there and 5 here" in said(folder, 0) and "seed" not in said(folder, 1)
