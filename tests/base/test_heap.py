import os
import subprocess
import sys

import pytest

from ddpm_ext.base.heap import VARIABLES, keep_freed_memory

# 40 tensors of 4 MiB, one after another: how many pages the system had to provide, none of them a large one.
PAGES = """
import ctypes, resource, torch
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
torch.set_num_threads(1)
from ddpm_ext.base.heap import keep_freed_memory
assert keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): torch.ones(2**20)
before = pages()
for _ in range(40): torch.ones(2**20)
print(pages() - before)
"""

glibc = pytest.mark.skipif(not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc")


def provided(**env):
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    run = subprocess.run([sys.executable, "-c", PAGES], check=True, capture_output=True, text=True, env=clean | env)
    return int(run.stdout)


@glibc
def test_freed_memory_is_used_again():
    """Unless parameters of the environment say otherwise."""
    assert provided() < 1000 < provided(MALLOC_MMAP_THRESHOLD_="131072")


def test_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert not keep_freed_memory()
