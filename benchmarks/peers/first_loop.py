"""What the first loops of an accelerated scheduler cost, in which its rows are found, and when they have paid."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.peers.cases import STEPS, scheduler_loop
from ddpm_ext import accelerate

SHAPE = (1, 4, 64, 64)
SCHEDULERS = {
    "UniPC": "UniPCMultistep",
    "LCM": "LCM",
    "DEIS": "DEISMultistep",
    "DPM++": "DPMSolverMultistep",
    "Euler": "EulerDiscrete",
    "FlowMatchEuler": "FlowMatchEulerDiscrete",
    "PNDM": "PNDM",
    "Heun": "HeunDiscrete",
    "DPM2": "KDPM2Discrete",
}
OPTIONS = {"PNDM": {"skip_prk_steps": True}}  # as Stable Diffusion has it; others can't be traced
HEAD = (
    "",
    f"## The first loop: CPU time in ms of {STEPS} steps, {'x'.join(map(str, SHAPE))}, without a model",
    "",
    "The last column is the first accelerated loop of all in a process, after a plain one: the code runs for the first",
    "time, and the scheduler's own steps prove the rows.",
    "",
    "| scheduler | plain loop | first ours | second | later | first / plain | breaks even at | first of a process |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
)
REPEATS, LATER, PROCESSES = 9, 4, 5


def first_loop_rows() -> Iterator[str]:
    """The rows of the table: medians over settings that were never seen before, each with objects of its own."""
    import diffusers

    fresh = itertools.count(901)  # timesteps of training, one setting each
    for label, name in SCHEDULERS.items():
        cls = getattr(diffusers, f"{name}Scheduler")
        times = []
        for _ in range(REPEATS):
            plain = cls(num_train_timesteps=next(fresh), **OPTIONS.get(label, {}))
            ours = accelerate(plain)
            loops = [(_loop(plain), _loop(ours)) for _ in range(2 + LATER)]
            own, (first, second, *later) = zip(*loops, strict=True)
            times.append((statistics.mean(own), first, second, statistics.mean(later)))
        own, first, second, later = map(statistics.median, zip(*times, strict=True))
        cells = [*(f"{ms:.2f}" for ms in (own, first, second, later)), f"{first / own:.1f}"]
        cells.append(_break_even(own, first, second, later))
        cells.append(f"{statistics.median(_in_a_new_process(label) for _ in range(PROCESSES)):.2f}")
        yield f"| {label} | {' | '.join(cells)} |"


def _break_even(plain: float, first: float, second: float, later: float) -> str:
    """After how many loops the accelerated ones have taken no more time than as many plain ones."""
    if first <= plain:
        return "1"
    if first + second <= 2 * plain:
        return "2"
    owed = first + second - 2 * plain
    return "never" if later >= plain else str(2 + -int(-owed // (plain - later)))


def _loop(scheduler: Any) -> float:
    """A loop's CPU time in ms."""
    loop = scheduler_loop({})(scheduler, SHAPE)
    begun = time.process_time()
    loop()
    return (time.process_time() - begun) * 1e3


def _in_a_new_process(label: str) -> float:
    """The CPU time in ms of the first accelerated loop of all."""
    command = [sys.executable, "-m", __name__, label]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    import diffusers

    scheduler = getattr(diffusers, f"{SCHEDULERS[sys.argv[1]]}Scheduler")(**OPTIONS.get(sys.argv[1], {}))
    _loop(scheduler)
    print(_loop(accelerate(scheduler)))
