"""The tests of the CUDA kernels on the CPU once more, with the kernels under AddressSanitizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cuda_host import library

pytest_plugins = "support.cuda_host.fixtures"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(library.GIVEN), reason="builds a library of its own"),
]

POISONED = """
import torch
from support.cuda_host import calls, library
from pathlib import Path
host = calls.Host(Path(library.GIVEN))
x = torch.zeros(2, 64)
host.control.poison(x.data_ptr() + 496, 16)
host.operators.forward_process(x, torch.ones(1, 2), None, 0, None, False, None, 0, None, 0, 0, -1, None)
"""


@pytest.fixture(scope="module")
def sanitized(one_host):
    """The sanitized library, and a function that runs Python on it."""
    if not library.sanitizer_libraries():
        pytest.skip("g++ has no AddressSanitizer")
    path = library.build_sanitized(one_host.path)
    environment = library.sanitized_environment(path)
    environment["PYTHONPATH"] = os.pathsep.join([*sys.path, environment.get("PYTHONPATH", "")])

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)

    return run


def test_under_sanitizers(sanitized):
    """Without the tests of arithmetic alone, and of bfloat16, whose memory is float16's."""
    less = "rounding or special or trace or large or sector or refused or grid or root"
    chosen = ["-k", f"not (bfloat16 or {less})"]
    files = [
        Path(__file__).with_name(f"test_{of}.py")
        for of in ("cuda_host", "cuda_host_steps", "cuda_host_words", "stand_in")
    ]
    # -s: a sanitizer's report ends the process, and what pytest has captured is lost
    done = sanitized("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "--tb=short", *chosen, *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200


def test_the_sanitizer_is_awake(sanitized):
    done = sanitized("-c", POISONED)
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr, done.stderr[-5000:]
