"""The memory that is kept for results: its C++ code with threads, forks and time, under sanitizers."""

import os
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.mark.parametrize(
    ("sanitizers", "arguments"),
    # A process of several threads that forks is beyond ThreadSanitizer.
    [("address,undefined", ["forks"]), ("thread", [])],
)
def test_block_pool(root, tmp_path, sanitizers, arguments):
    program = tmp_path / "trial"
    sources = [root / "tests/support/block_pool_trial.cpp", root / "csrc/ops/block_pool.cpp"]
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", *flags, f"-I{root / 'csrc'}", *sources, "-o", program], check=True)
    env = os.environ | {"ASAN_OPTIONS": "allocator_may_return_null=1"}
    run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, env=env)
    assert (run.returncode, run.stdout) == (0, "good\n"), run.stdout + run.stderr
