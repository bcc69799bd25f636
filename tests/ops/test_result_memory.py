"""Large results on a CPU come from memory that is kept, and are tensors like any other."""

import gc
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.compilers import compiled
from torch.utils import cpp_extension

import ddpm_ext
from ddpm_ext import GaussianDiffusion, Philox, memory_info, randn, release_memory
from ddpm_ext.ops import fused, result_memory

MIB = 2**20
ONE_MIB = (4, 1, 256, 256)


@pytest.fixture(autouse=True, scope="module")
def without_older_objects():
    gc.freeze()  # a collection of all that a process of many tests holds takes a second
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def empty_pool():
    gc.collect()
    release_memory()
    yield
    release_memory()


def zeros_model(x, t):
    return torch.zeros_like(x)


def results(gd, x):
    """What makes each kind of result."""
    table = gd.table("steps", "x", x)
    return {
        "q_sample": lambda: gd.q_sample(x, 5),
        "p_sample": lambda: gd.p_sample(zeros_model, x, 5),
        "predict_start": lambda: gd.predict_start_from_noise(x, 5, x),
        "step_with_options": lambda: fused.step_with_options(x, x, table, 5, history1=x),
        "randn": lambda: randn(x.shape, Philox(0)),
    }


def used_by(make):
    before = memory_info()["used"]
    kept_alive = make()
    return memory_info()["used"] - before, kept_alive


@pytest.mark.parametrize("name", ["q_sample", "p_sample", "predict_start", "step_with_options", "randn"])
def test_large_results_come_from_the_pool(name):
    make = results(GaussianDiffusion(), torch.zeros(ONE_MIB))[name]
    used, result = used_by(make)
    assert used == result.nbytes == MIB
    place = result.data_ptr()
    del result
    assert memory_info()["kept"] == MIB
    assert make().data_ptr() == place
    release_memory()
    assert memory_info()["kept"] == 0


def test_small_results_and_given_memory_do_not():
    gd, x = GaussianDiffusion(), torch.zeros(1, 3, 32, 32)
    out = torch.empty(ONE_MIB)
    used, _ = used_by(lambda: (gd.q_sample(x, 5), gd.q_sample(torch.zeros(ONE_MIB), 5, out=out)))
    assert used == 0


def test_a_chained_loop_takes_two_blocks():
    gd = GaussianDiffusion()
    x, places = randn(ONE_MIB, Philox(0)), set()
    for t in reversed(range(100)):
        x = gd.p_sample(zeros_model, x, t)
        places.add(x.data_ptr())
    assert len(places) == 2


def of_size(mib, seed=0):
    return randn((1, mib * MIB // 4), Philox(seed))


def test_what_is_kept_is_bounded_and_goes_when_another_size_is_asked_for():
    kept = [of_size(1) for _ in range(10)]
    del kept
    assert memory_info()["kept_blocks"] == 8
    two = of_size(2)
    assert memory_info()["kept_blocks"] == 0
    one = of_size(1)
    del one, two
    for _ in range(3):  # both sizes are kept from now on
        of_size(1), of_size(2)
        assert (memory_info()["kept_blocks"], memory_info()["kept"]) == (2, 3 * MIB)
    limit = memory_info()["limit"]
    try:
        ddpm_ext.ops.extension.C.limit_result_memory(2 * MIB)
        three, two = of_size(3), of_size(2)
        del three, two
        assert memory_info()["kept"] == 2 * MIB
    finally:
        ddpm_ext.ops.extension.C.limit_result_memory(limit)


@pytest.mark.subprocess
def test_threads_and_forks_have_blocks_of_their_own(root, tmp_path):
    """In C++, where no lock of Python's keeps threads apart."""
    code = """
import ctypes, signal, sys, torch
signal.alarm(100)  # a fork that waits for a lost thread
tried = ctypes.CDLL(sys.argv[1]).try_results
tried.restype = ctypes.c_bool
assert tried(*map(ctypes.c_int64, (4, 200)))
"""
    torchs = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    sources = [root / "csrc/ops/result_memory.cpp", *torchs]
    trial = compiled("g++", "result_memory_trial.cpp", tmp_path, ["-O1", "-pthread"], sources)
    subprocess.run([sys.executable, "-c", code, trial._name], check=True, timeout=120)


def test_a_result_outlives_the_module():
    code = """
import atexit, os, sys, threading
kept = []
atexit.register(lambda: os.write(1, repr(kept[0].add_(1).double().mean().item()).encode()))
from ddpm_ext import Philox, randn
kept.append(randn((4, 1, 256, 256), Philox(0)))
for name in [name for name in sys.modules if name.startswith("ddpm_ext")]: del sys.modules[name]
del Philox, randn
sys.stdout = type("Late", (), {"held": kept[0], "flush": lambda self: None, "write": lambda self, text: None})()
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert float(done.stdout) == pytest.approx(randn((4, 1, 256, 256), Philox(0)).double().mean().item() + 1, abs=1e-6)


def test_values_dtypes_and_layouts_are_those_of_torchs_memory():
    gd, rng = GaussianDiffusion(), Philox(3)
    inputs = [
        torch.randn(4, 3, 256, 256),
        torch.randn(4, 3, 256, 256).to(memory_format=torch.channels_last),
        torch.randn(4, 256, 256, 3).permute(0, 3, 1, 2)[:, :, ::2],
        torch.randn(4, 3, 256, 256, dtype=torch.bfloat16),
        torch.randn(4, 3, 256, 256, dtype=torch.float16).transpose(2, 3),
    ]
    pooled = [gd.p_sample(zeros_model, x, 5, rng=rng) for x in inputs]
    limit = memory_info()["limit"]
    try:
        ddpm_ext.ops.extension.C.limit_result_memory(0)
        used, plain = used_by(lambda: [gd.p_sample(zeros_model, x, 5, rng=rng) for x in inputs])
    finally:
        ddpm_ext.ops.extension.C.limit_result_memory(limit)
    assert used == 0
    for x, a, b in zip(inputs, pooled, plain, strict=True):
        assert a.stride() == b.stride() == torch.empty_like(x).stride()
        assert a.dtype == b.dtype and torch.equal(a, b)


# ------------------------------------------------------------------------------------------ a tensor like any other


def pooled():
    x = randn(ONE_MIB, Philox(1))
    return x, x.clone()


def test_saved_pickled_copied_and_shared():
    x, expected = pooled()
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), expected)
    assert torch.equal(pickle.loads(pickle.dumps(x)), expected)
    assert torch.equal(torch._lazy_clone(x).add_(1), expected + 1)
    x.share_memory_()
    assert x.is_shared() and torch.equal(x, expected)


def test_resized():
    x, expected = pooled()
    x.untyped_storage().resize_(2 * MIB)
    assert torch.equal(x, expected)
    assert memory_info()["used"] >= 2 * MIB
    x.untyped_storage().resize_(16)
    x.resize_(4)
    assert torch.equal(x, expected.flatten()[:4])


def test_views_of_other_libraries_keep_the_memory():
    x, expected = pooled()
    array, capsule = x.numpy(), torch.utils.dlpack.to_dlpack(x)
    del x
    gc.collect()
    other = randn(ONE_MIB, Philox(2))
    np.testing.assert_array_equal(array, expected.numpy())
    assert torch.equal(torch.from_dlpack(capsule), expected)
    assert not torch.equal(other, expected)


def test_inference_mode_subclasses_and_the_profiler():
    with torch.inference_mode():
        assert randn(ONE_MIB, Philox(0)).is_inference()
    x = torch.nn.Parameter(torch.zeros(ONE_MIB), requires_grad=False)
    table = GaussianDiffusion().table("steps", "x", x)
    assert type(fused.step_with_options(x, x, table, 5, history1=x)) is torch.Tensor
    with torch.profiler.profile(profile_memory=True) as seen:
        GaussianDiffusion().q_sample(torch.zeros(ONE_MIB), 5)
    assert any(event.cpu_memory_usage == MIB for event in seen.events() if event.name == "ddpm_ext::forward_process")


# --------------------------------------------------------------------------------------------------- the variable


@pytest.mark.parametrize(("given", "limit"), [("0", 0), ("64", 64 * MIB), ("", 1024 * MIB)])
def test_the_variable_is_the_bound(monkeypatch, given, limit):
    monkeypatch.setenv(result_memory.VARIABLE, given)
    assert result_memory._limit() == limit


@pytest.mark.parametrize("given", ["-1", "1.5", "64MiB", "٣", " "])
def test_a_variable_that_is_no_number(monkeypatch, given):
    monkeypatch.setenv(result_memory.VARIABLE, given)
    with pytest.raises(ValueError, match=r"DDPM_EXT_RESULT_MEMORY is .*, expected a whole number of MiB"):
        result_memory._limit()
