"""Runs the ranks of a run as forks of a process that has already imported their modules, since imports are slow."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support.command_line import ENVIRONMENT

FORKS = "--forks"
Runs = dict[str, list[dict[str, Any]]]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A context that yields the number of a free port of 127.0.0.1, and reserves the port.

    While it is reserved, the system does not give it to a program that asks for any free port. A process that asks for
    this number gets it, as rank 0 does.
    """
    with socket.socket() as holder:
        # Bound, but not listening: another socket with SO_REUSEADDR, such as that of torch's store, can still listen.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class Leave(SystemExit):
    """Raised to end a fork like an ordinary process, with everything that Python does at exit."""


def in_forks(script: str, folder: Path, runs: Runs) -> dict[str, list[int]]:
    """Starts the script `script`, whose `serve` executes the runs one after the other.

    The folder of a run is `folder`/name/run. The output of rank 0 is in `folder`/name/0.out and 0.err.

    Args:
        runs: the options of each rank, by the run's name. A rank whose options have "stuck" is killed when all ranks
            before it have ended.

    Returns:
        The exit codes of the ranks by the run's name. A rank killed by a signal has minus the signal's number.
    """
    command = [sys.executable, script, FORKS, str(folder), json.dumps(runs, default=str)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def said(folder: Path, rank: int, where: str = "err") -> str:
    """What a rank wrote to a stream, "out" or "err". folder: the folder `folder`/name in which in_forks put the run."""
    return (folder / f"{rank}.{where}").read_text()


def serve(act: Callable[..., None], *modules: str) -> None:
    """The main function of a script that in_forks starts: imports `modules` and calls act(folder, **options) in forks.

    Prints the exit codes of the ranks as JSON, for in_forks.
    """
    torch.set_num_threads(1)
    for module in ("torch.distributed", *modules):
        importlib.import_module(module)
    folder, runs = Path(sys.argv[2]), json.loads(sys.argv[3])
    print(json.dumps({name: _codes(folder / name, by_rank, act) for name, by_rank in runs.items()}))


def _codes(folder: Path, by_rank: list[dict], act: Callable[..., None]) -> list[int]:
    folder.mkdir(exist_ok=True)
    codes = []
    with reserved_port() as port:
        stuck = [options.pop("stuck", False) for options in by_rank]
        children = [_fork(folder, rank, len(by_rank), port, act, options) for rank, options in enumerate(by_rank)]
        for child, is_stuck in zip(children, stuck, strict=True):
            if is_stuck:
                os.kill(child, signal.SIGKILL)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def _fork(folder: Path, rank: int, size: int, port: int, act: Callable[..., None], options: dict) -> int:
    """Forks a process that calls act(`folder`/run, **options) and writes its output to `folder`. Returns its id."""
    child = os.fork()
    if child:
        return child
    code, leaves = 1, False
    try:
        for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
        if size > 1:
            ours = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in ours.items()})
        act(folder / "run", **options)
        code = 0
    except Leave:
        leaves = True
        raise
    except SystemExit as stopped:
        code = stopped.code
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)  # after this clause, the error and the objects in its frames are freed
    except Exception:
        traceback.print_exc()
    finally:
        if not leaves:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
