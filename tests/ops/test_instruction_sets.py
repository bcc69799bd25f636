"""DDPM_EXT_CPU: every instruction set gives the same bits, and a wrong name raises one clear error."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# The features that a CPU must have, by their names in /proc/cpuinfo. Better sets come later.
NEEDS = {
    "portable": set(),
    "neon": {"asimd"},
    "sse2": {"sse2"},
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512dq"},
}

PROGRAM = """
import itertools, math, sys
import torch
import ddpm_ext
from support.step_inputs import make_row, make_table, options
from ddpm_ext import Philox, ops

def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

table = make_table(4)
affine, t = normal(4, 2, seed=1), torch.tensor([3, 0, 1, 2, 1])
weighted = normal(4, 4, seed=5)

def losses(m, x, t, **options):  # of samples and their mean, with slopes
    found = []
    for reduction in ("none", "mean"):
        leaf = m.clone().requires_grad_()
        loss = ops.diffusion_loss(leaf, x, weighted, t, reduction=reduction, **options)
        loss.sum().backward()
        found.append((loss.detach(), leaf.grad))
    return found

dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
results = {}
for shape in [(5, 1), (5, 67), (5, 3, 17, 19), (5, 4096)]:
    x, m, z = (2 * normal(*shape, seed=seed) for seed in (2, 3, 4))
    for (a, x_dtype), (b, m_dtype) in itertools.product(dtypes.items(), dtypes.items()):
        if a not in (b, "float32"):
            continue
        xs, ms, zs = x.to(x_dtype), m.to(m_dtype), z.to(x_dtype)
        for noise, how in {
            "drawn": {"rng": Philox(2**64 - 3, 2**32 - 2)},
            "given": {"noise": zs},
            "none": {"add_noise": False},
        }.items():
            key = f"{shape} {a} {b} {noise}"
            results[f"reverse_step {key}"] = ops.reverse_step(xs, ms, table, t, **how)
            results[f"reverse_step unclipped {key}"] = ops.reverse_step(xs, ms, table, t, clip=None, **how)
            results[f"forward_process {key}"] = ops.forward_process(xs, affine, t, **how)
        results[f"predict_start {shape} {a} {b}"] = ops.predict_start(xs, ms, affine, t)
        noises = {"noise": zs}, {"rng": Philox(4)}
        for loss, target, noise in itertools.product(("mse", "l1", "huber"), (xs, None), noises):
            key = f"{loss} {target is None} {shape} {a} {b} {list(noise)}"
            each, mean = losses(ms, target, t, loss=loss, delta=0.7, **noise)
            results[f"loss {key}"], results[f"mean {key}"], results[f"slope {key}"] = each[0], mean[0], mean[1]
            results[f"slopes {key}"] = each[1]
    for name, dtype in dtypes.items():
        for stream in (0, 255):
            rng = Philox(0xDEADBEEFCAFEF00D, 2**56 - 5, draw=2**32 - 1, stream=stream)
            results[f"randn {shape} {name} {stream}"] = ddpm_ext.randn(shape, rng, dtype=dtype)
results["randn long"] = ddpm_ext.randn((1, 2_000_003), Philox(1))

# every 16-bit number there is, and float32 numbers all the way to overflow and underflow when rounded to 16 bits
bits = torch.arange(2**16).to(torch.int32)
whole = make_row(a=1.0, c0=1.0)
third = torch.tensor([[1 / 3, 0.0], [1.0, 0.0], [3.0, 0.0]])
for name in ("float16", "bfloat16"):
    every = bits.to(torch.int16).view(dtypes[name]).view(1, -1)
    every = torch.where(every.isnan(), torch.zeros_like(every), every)
    results[f"clipped {name}"] = ops.reverse_step(every, every, whole, 0, add_noise=False)
    for row in range(3):
        results[f"scaled {name} {row}"] = ops.forward_process(every, third, row, add_noise=False)
special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3e38]).repeat(20).view(1, -1)
for row in range(4):
    key = f"special {row}"
    results[key] = ops.reverse_step(special, special.flip(1), table, row, noise=special.roll(3))
    for loss in ("mse", "l1", "huber"):
        for i, (value, slope) in enumerate(losses(special, special.roll(1), row, loss=loss, noise=special.roll(3))):
            results[f"{loss} {key} {i}"], results[f"{loss} slope {key} {i}"] = value, slope
        (value, slope), _ = losses(special.T, special.roll(1).T, row, loss=loss, noise=special.roll(3).T)
        results[f"{loss} each {key}"], results[f"{loss} each slope {key}"] = value, slope

# the factors that follow from statistics: of few elements and many, of all ranks, with guidance and without
for shape, dtype in itertools.product([(5, 1), (5, 67), (5, 3, 17, 19), (5, 4096)], dtypes.values()):
    x, m, u = (2 * normal(*shape, seed=seed).to(dtype) for seed in (2, 3, 4))
    for quantile, given in itertools.product((0.2, 0.995, 1.0), ({}, {"uncond_output": u})):
        key = f"{shape} {dtype} {quantile} {list(given)}"
        results[f"x_start_scale {key}"] = ops.x_start_scale(x, m, table, t, quantile=quantile, **given)
    if x[0].numel() > 1:
        results[f"output_scale {shape} {dtype}"] = ops.output_scale(m, u, guidance=3.0, rescale=0.7)

# the step with options: its inputs one by one, all at once, and some of them
table, t = make_table(8), torch.tensor([3, 0, 1, 2, 7])
odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
for shape, (a, b) in itertools.product([(5, 67), (5, 3, 17, 19)], itertools.product(dtypes, dtypes)):
    if a not in (b, "float32"):
        continue
    x, m, z = (2 * normal(*shape, seed=seed) for seed in (2, 3, 4))
    x.view(-1)[: 11 * 30 : 11] = odd.repeat(6)[: len(x.view(-1)[: 11 * 30 : 11])]
    x, m, z = x.to(dtypes[a]), m.to(dtypes[b]), z.to(dtypes[a])
    every = options(shape, dtypes[a], dtypes[b])
    names = list(every)
    for chosen in [0, -1, *(1 << i for i in range(len(names))), *(0x9E3779B1 * i >> 7 for i in range(16))]:
        given = {name: every[name] for i, name in enumerate(names) if chosen >> i & 1}
        if ("known" in given) != ("mask" in given):
            given |= {name: every[name] for name in ("known", "mask")}
        noise = [{"rng": Philox(5, 2**33)}, {"noise": z}, {"add_noise": False}][chosen % 3]
        kept = {name: torch.empty_like(x) for name in ("x0_out", "history_out")}
        key = f"{shape} {a} {b} {list(given)} {list(noise)}"
        how = {**noise, **given, "log_variance": chosen % 5 < 3, **kept}
        results[f"step {key}"] = ops.step_with_options(x, m, table, t, **how)
        results |= {f"{name} {key}": result for name, result in kept.items()}
v = torch.arange(-(2**31), 2**31, 30011).to(torch.int32).view(torch.float32).view(1, -1)
for log in (True, False):
    how = {"model_variance": v, "noise": torch.ones_like(v), "log_variance": log}
    row = make_row(s=1.0, l1=1.0)
    results[f"deviation {log}"] = ops.step_with_options(torch.zeros_like(v), None, row, 0, **how)
torch.save({key: result.clone() for key, result in results.items()}, sys.argv[1])
print(ddpm_ext.build_info()["cpu"])
"""


def run(root: Path, name: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "DDPM_EXT_CPU"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env["OMP_NUM_THREADS"] = "1"
    if name is not None:
        env["DDPM_EXT_CPU"] = name
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def flags() -> set[str]:
    if platform.machine() in ("aarch64", "arm64"):
        return {"asimd"}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


def available() -> list[str]:
    return [name for name, needs in NEEDS.items() if needs <= flags()]


@pytest.fixture(scope="module")
def results(root, tmp_path_factory):
    """The results of each instruction set, by its name."""
    found = {}
    for name in available():
        path = tmp_path_factory.mktemp("bits") / f"{name}.pt"
        done = run(root, name, "-c", PROGRAM, str(path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == name
        found[name] = torch.load(path)
    return found


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "portable"])
def test_same_bits_as_portable(results, name):
    if name not in results:
        pytest.skip(f"this CPU has no {name}")
    assert results[name].keys() == results["portable"].keys()
    for key, expected in results["portable"].items():
        got = results[name][key]
        number = ~expected.isnan()  # the bits of a NaN are not specified
        integer = torch.int32 if got.dtype == torch.float32 else torch.int16
        assert torch.equal(got.isnan(), expected.isnan()), key
        assert torch.equal(got.view(integer)[number], expected.view(integer)[number]), key


def test_the_best_is_chosen(root):
    done = run(root, None, "-c", "import ddpm_ext; print(ddpm_ext.build_info()['cpu'])")
    assert done.stdout.strip() == available()[-1], done.stderr
    done = run(root, "", "-c", "import ddpm_ext; print(ddpm_ext.build_info()['cpu'])")
    assert done.stdout.strip() == available()[-1], done.stderr


WRONG = """
import ddpm_ext, torch
from ddpm_ext import ops
for call in (
    lambda: ddpm_ext.randn((1, 4), ddpm_ext.Philox(0)),
    lambda: ops.forward_process(torch.zeros(1, 4), torch.ones(1, 2), 0, add_noise=False),
    lambda: ddpm_ext.build_info(),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["sse9", "AVX2", "portable,avx2", "0"])
def test_a_wrong_name_is_one_clear_error(root, name):
    done = run(root, name, "-c", WRONG)
    assert done.returncode == 0, done.stderr
    expected = f"DDPM_EXT_CPU is '{name}', expected one that this CPU has: {', '.join(reversed(available()))}"
    assert done.stdout.splitlines() == [expected] * 3


def test_a_set_that_the_cpu_lacks_is_refused(root):
    lacking = [name for name in NEEDS if name not in available()]
    if not lacking:
        pytest.skip("this CPU has them all")
    done = run(root, lacking[-1], "-c", WRONG)
    assert done.stdout.count(f"DDPM_EXT_CPU is '{lacking[-1]}'") == 3, done.stderr
