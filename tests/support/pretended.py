"""The environment of processes with a pretended card, and the selection of the tests that they run.

A sitecustomize.py installs the pretended card (pretended_card.py) in a process before its first line. So everything
that the process imports, and every process that it forks, has the card. This file does not import torch.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The environment variable that says which tests run: "all"; "first", each function with its first parameters only; or
# "few", only the first test of each file.
SIGN = "DDPM_EXT_PRETENDED_CARD"
SITE = """
import sys
if "benchmarks.gpu" not in sys.orig_argv:  # which runs the parts, and must do without torch
    from support import pretended_card
    pretended_card.install()
"""
# The reasons for which a test cannot run with the pretended card, and words in the names of such tests.
NOT_PRETENDED = {
    "too long on a CPU": "more_samples_than_a_grid large_batch test_any_ values_and_slopes accelerated_tutorial",
    "C++ looks into its tensors": "compile opcheck export fake without_data traced_ trace_of torch_func in_a_mode "
    "each_sample",
    "C++ asks for a tensor's device": "autocast as_the_operators subclass gradients_of_p_mean",
    "C++ makes other tensors on the host": "test_x_start_scale test_special_numbers",
    "C++ checks nothing first where operators are watched": "process/test_bad launches_of_its_inputs",
    "only one thread has the card": "threads",
    "the CPU's kernels check values": "not_read_back_from_a_gpu",
    "a card's generators and pickles": "leaves_torchs_generators table_on_a_device",
}
WORDS = " ".join(NOT_PRETENDED.values()).split()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    possible = [item for item in items if not any(word in item.nodeid for word in WORDS)]
    until = "::" if os.environ[SIGN] == "few" else "["
    first = {item.nodeid.partition(until)[0]: item for item in reversed(possible)}
    selected = possible if os.environ[SIGN] == "all" else [item for item in possible if item in first.values()]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected


def environment(root: Path, folder: Path, parameters: str, site: str = "") -> dict[str, str]:
    """The environment variables of processes with the card, which run in `root` with the tests there.

    Writes sitecustomize.py to `folder`. That file runs the code `site` before it installs the card.

    parameters: which tests run, the value of the variable SIGN.
    """
    (folder / "sitecustomize.py").write_text(site + SITE)
    added = {"PYTHONPATH": f"{folder}{os.pathsep}{root / 'tests'}", "PYTEST_PLUGINS": "support.pretended"}
    return os.environ | added | {SIGN: parameters, "OMP_NUM_THREADS": "1"}
