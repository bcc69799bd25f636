"""The CUDA sources: what they include, that they compile for both architectures, and what the compiler made of them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ARCHS = ["80", "90"]
ASSEMBLED = "90"  # the other stops at PTX, since ptxas takes as long again
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))


def load_setup():
    spec = importlib.util.spec_from_file_location("ddpm_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------- includes


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("folder", ["cuda", "core"])
def test_includes(folder):
    """Below the operators nothing of torch but c10/cuda; in core nothing but C's headers and core itself."""
    ours = {"cuda": r"core/|cuda/|args\.h|c10/cuda/|cuda_\w+\.h$|\w+$", "core": r"core/|(math|stdint|string)\.h$"}
    files = [path for path in (CSRC / folder).iterdir() if path.suffix in (".h", ".cuh", ".cu")]
    assert len(files) >= 3
    for path in files:
        for name in includes(path):
            assert re.match(ours[folder], name), f"{path.name} includes {name}"


# ------------------------------------------------------------------------------------------------- compile


class Compiled(NamedTuple):
    """Of one source for one architecture: the PTX, the folders and files it was made of, ptxas' remarks."""

    ptx: str
    files: set[str]
    remarks: str

    def kernels(self) -> dict[str, str]:
        """Bodies by mangled names."""
        parts = re.split(r"^\s*(?:\.visible|\.weak)?\s*\.entry\s+(\w+)", self.ptx, flags=re.MULTILINE)
        return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    setup = load_setup()
    env = {key: value for key, value in os.environ.items() if key != "DDPM_EXT_CUDA"}
    plan = setup.make_plan(env, torch.__version__, torch.version.cuda)
    if plan.toolkit is None:
        pytest.skip(plan.why_cpu)
    flags = [f for f in setup.NVCC_FLAGS if f != "-lineinfo"]
    flags += ["-std=c++20", f"-I{CSRC}", *(f"-isystem={p}" for p in cpp_extension.include_paths())]
    flags += ["--keep", "-Xptxas=-v"]
    nvcc = Path(plan.toolkit.home) / "bin" / "nvcc"

    def compile_one(job: tuple[Path, str]) -> Compiled:
        source, arch = job
        folder = tmp_path_factory.mktemp(f"{source.stem}_{arch}")
        ptx, cubin = folder / f"{source.stem}.ptx", folder / f"{source.stem}.cubin"
        target = ["-cubin", "-o", str(cubin)] if arch == ASSEMBLED else ["-ptx", "-o", str(ptx)]
        command = [nvcc, *flags, f"-arch=sm_{arch}", "--keep-dir", str(folder), *target, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert arch != ASSEMBLED or cubin.stat().st_size > 0
        preprocessed = (folder / f"{source.stem}.cpp1.ii").read_text(errors="replace")
        files = set(re.findall(r'^# \d+ "([^"<]+)"', preprocessed, re.MULTILINE))
        return Compiled(ptx.read_text(), files, done.stderr + done.stdout)

    jobs = [(source, arch) for arch in ARCHS for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([(s.stem, a) for s, a in jobs], pool.map(compile_one, jobs), strict=True))


EACH = pytest.mark.parametrize(("source", "arch"), [(source.stem, arch) for source in SOURCES for arch in ARCHS])


@EACH
def test_compiles(compiled, source, arch):
    result = compiled[source, arch]
    assert f".target sm_{arch}" in result.ptx
    assert result.kernels()


@EACH
def test_no_library_headers_but_the_runtimes(compiled, source, arch):
    """A toolkit without cuBLAS, cuSPARSE and the like is enough."""
    files = compiled[source, arch].files
    assert any(f.endswith("core/philox.h") for f in files)
    heavy = re.compile(r"/(ATen|torch/csrc|caffe2)/|/(cublas|cusparse|cusolver|cufft|curand|cudnn)\w*\.h$")
    assert not [f for f in files if heavy.search(f)]


@EACH
def test_arithmetic_is_that_of_the_source(compiled, source, arch):
    """Float32 operations rounded to nearest, none that ptxas could contract, flush or approximate; no float64."""
    ptx = compiled[source, arch].ptx
    instructions = re.findall(r"^\s+(?:@!?%\w+\s+)?([a-z]\w*(?:\.\w+)*)", ptx, re.MULTILINE)
    assert len(instructions) > 1000
    floating = {i for i in instructions if ".f32" in i or ".f64" in i or ".f16" in i or ".bf16" in i}
    assert "fma.rn.f32" in floating and "sqrt.rn.f32" in floating
    bad = {i for i in floating if re.search(r"\.(ftz|approx|full|f64|f32x2|sat)\b", i)}
    arithmetic = {
        i for i in floating if re.match(r"(add|sub|mul|mad|fma|div|rcp|sqrt|rsqrt|sin|cos|lg2|ex2|tanh)\.", i)
    }
    bad |= {i for i in arithmetic if not re.fullmatch(r"(add|sub|mul|fma|div|sqrt)\.rn\.f32", i)}
    assert not bad


@pytest.mark.parametrize("arch", ARCHS)
def test_normals_contract_nothing(compiled, arch):
    """As many fma beside each square root as core/normal.h writes."""
    text = re.sub(r"//.*", "", (CSRC / "core" / "normal.h").read_text())
    fma, sqrt = len(re.findall(r"\bfma\(", text)), len(re.findall(r"\bsqrt\(", text))
    kernels = {
        n: body for (_, a), c in compiled.items() if a == arch for n, body in c.kernels().items() if "Randn" in n
    }
    assert kernels
    for name, body in kernels.items():
        assert body.count("sqrt.rn.f32") > 0, name
        assert body.count("fma.rn.f32") * sqrt == body.count("sqrt.rn.f32") * fma, name


@EACH
def test_128_bit_loads_and_stores(compiled, source, arch):
    wide = r"\.global(?:\.\w+)*\.(v4\.[bfu]32|v2\.[bfu]64)"
    kernels = compiled[source, arch].kernels()
    stores = {name: body for name, body in kernels.items() if re.search("st" + wide, body)}
    # one of the three ways to reach memory
    assert len(stores) * 4 >= len(kernels)
    for name, body in stores.items():
        assert "Randn" in name or re.search("ld" + wide, body), name


@pytest.mark.parametrize("source", [source.stem for source in SOURCES])
def test_no_arrays_in_local_memory(compiled, source):
    """A register or two may spill, a vector may not."""
    result = compiled[source, ASSEMBLED]
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame", result.remarks)]
    assert len(frames) >= len(result.kernels())
    assert max(frames) <= 16  # measured 8
