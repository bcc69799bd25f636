"""A run of several processes writes the same files as one, even if a process is killed on the way."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support import exact_run
from support.exact_run import COUNT, contents
from support.ports import reserved_port

SCRIPT = Path(exact_run.__file__)
PATH = os.pathsep.join(path for path in sys.path if path)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}


HANGS = 600  # seconds


@contextmanager
def started(folder, size, **options):
    """One process for each rank, as a launcher other than torchrun would start them. They end with the block."""
    with reserved_port() as port, ExitStack() as running:
        meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = []
        for rank in range(size):
            command = [sys.executable, str(SCRIPT), str(folder), json.dumps(options)]
            environment = ENVIRONMENT | meeting | {"RANK": str(rank)}
            how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(running.enter_context(subprocess.Popen(command, **how)))
            running.callback(processes[-1].kill)
        yield processes


def ends(folder, size, **options):
    """The exit code and the standard error of each rank; none may hang."""
    with started(folder, size, **options) as processes:
        errors = [process.communicate(timeout=HANGS)[1] for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.mark.parametrize(("size", "batch_size"), [(2, 1), (3, 7)])
def test_torchrun_gives_the_same_files(tmp_path, size, batch_size):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command = [*launcher, str(SCRIPT), str(tmp_path / "many"), json.dumps({"batch_size": batch_size})]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout.count("done")) == (0, size), done.stderr
    exact_run.run(tmp_path / "one")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert (tmp_path / "many" / "manifest.json").read_bytes() == (tmp_path / "one" / "manifest.json").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_the_others_and_the_next_run_goes_on(tmp_path, killed):
    folder = tmp_path / "run"
    ended = ends(folder, 2, batch_size=1, **{"by rank": {str(killed): {"die_at": (1, 2)}}})  # the other has drawn, too
    assert ended[killed][0] == -signal.SIGKILL
    code, error = ended[1 - killed]
    assert code == 1
    assert "another rank ended before the work was done" in error
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shards/0*.npy")}
    assert 2 <= len(before) < 6
    shards, result = exact_run.run(folder)  # in one process
    assert result.drawn == COUNT - sum(len(shards.ids(i)) for i in range(6) if shards.path(i) in before)
    assert all(path.stat().st_mtime_ns == time_before for path, time_before in before.items())
    exact_run.run(tmp_path / "one")
    assert contents(folder) == contents(tmp_path / "one")


def test_ranks_that_do_not_share_a_folder_are_refused(tmp_path):
    other = {"1": {"folder": str(tmp_path / "other")}}
    ended = ends(tmp_path / "run", 2, _VISIBLE_WITHIN=0.3, **{"by rank": other})
    assert [code for code, _ in ended] == [1, 1]
    assert f"another rank wrote {tmp_path / 'other' / 'manifest.json'}, but here it is not" in ended[1][1]
    assert "another rank ended" in ended[0][1]


def test_stuck_rank_is_reported(tmp_path):
    with started(tmp_path, 2, _PATIENCE=0.5, **{"by rank": {"1": {"pause": 1000}}}) as processes:
        assert "a rank is stuck" in processes[0].communicate(timeout=HANGS)[1]
        assert processes[0].returncode == 1
        assert len(list(tmp_path.glob("shards/0*.npy"))) == 3  # those of rank 0


def test_an_error_of_rank_0_ends_all(tmp_path):
    exact_run.run(tmp_path)
    ended = ends(tmp_path, 2, seed=5)
    assert [code for code, _ in ended] == [1, 2]  # rank 0 ends with a traceback, rank 1 without a message
    assert "seed is 0 there and 5 here" in ended[0][1]
    assert "seed" not in ended[1][1]
