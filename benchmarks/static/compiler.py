"""Compiles csrc/cuda for one architecture as setup.py would, and takes the result apart again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from benchmarks.static import sass
from benchmarks.static.cards import ARCHS
from benchmarks.static.kernels import CSRC, demangler

ROOT = Path(__file__).resolve().parents[2]
EVERY_SOURCE = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
# Of kernels that go from vector to vector; loss.cu's blocks add up.
SOURCES = [source for source in EVERY_SOURCE if source != "loss"]


class Missing(Exception):
    """What is needed to compile or to disassemble, and is not there."""


class Resources(NamedTuple):
    """Of one kernel: registers a thread, and bytes."""

    registers: int
    stack: int
    local: int
    shared: int
    spill_stores: int
    spill_loads: int


class Build(NamedTuple):
    """One source for one architecture."""

    source: str
    arch: str
    ptx: str
    files: set[str]  # that it includes
    kernels: list[sass.Kernel]
    resources: dict[str, Resources]  # by mangled name


class Tools(NamedTuple):
    nvcc: Path
    archs: list[str]  # of ours, those that this nvcc knows
    flags: dict[str, list[str]]  # by architecture
    nvdisasm: Path
    cuobjdump: Path


def load_setup() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("ddpm_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def disassembler(name: str, toolkit: Path) -> Path:
    """From the pinned wheel, else the toolkit's, else on PATH: a toolkit may be installed without."""
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
    except metadata.PackageNotFoundError:
        files = []
    here = [Path(file.locate()) for file in files if file.name == name and file.parent.name == "bin"]
    here += [toolkit / "bin" / name, Path(shutil.which(name) or "")]
    for path in here:
        if path.is_file():
            return path
    raise Missing(f"there is no {name}: pip install nvidia-cuda-{name}")


def find_tools() -> Tools:
    """Raises Missing with the reason."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        raise Missing("torch is needed for its headers") from error
    setup = load_setup()
    env = {key: value for key, value in os.environ.items() if key != "DDPM_EXT_CUDA"}
    plan = setup.make_plan(env, torch.__version__, torch.version.cuda)
    if plan.toolkit is None:
        raise Missing(plan.why_cpu)
    if demangler() is None:
        raise Missing("there is no c++filt on PATH to read the kernels' names: install binutils")
    home = Path(plan.toolkit.home)
    paths = ["-std=c++20", f"-I{CSRC}", *(f"-isystem={path}" for path in cpp_extension.include_paths())]
    archs = [arch for arch in ARCHS if f"{arch[:-1]}.{arch[-1]}" in plan.toolkit.archs]
    flags = {
        arch: [*setup.nvcc_flags(plan.toolkit.version, [f"-gencode=arch=compute_{arch},code=sm_{arch}"]), *paths]
        for arch in archs
    }
    return Tools(home / "bin" / "nvcc", archs, flags, disassembler("nvdisasm", home), disassembler("cuobjdump", home))


def output(*command: str | os.PathLike[str]) -> str:
    """Both streams of a command; what it prints is the error if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} ends with {done.returncode}: {done.stdout.strip()}")
    return done.stdout


def version(tool: Path) -> str:
    found = re.search(r"\bV(\d+\.\d+\.\d+)", output(tool, "--version"))
    return found[1] if found else "unknown"


def resources(usage: str, remarks: str) -> dict[str, Resources]:
    """By kernel, of what `cuobjdump --dump-resource-usage` prints and what `ptxas -v` remarks about spills."""
    spills = {
        name: (int(stores), int(loads))
        for name, stores, loads in re.findall(
            r"Function properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            remarks,
        )
    }
    found = {}
    for name, line in re.findall(r"Function (\w+):\s+(REG:.*)", usage):
        sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        found[name] = Resources(sizes["REG"], sizes["STACK"], sizes["LOCAL"], sizes["SHARED"], *spills[name])
    return found


def build(tools: Tools, source: str, arch: str, folder: Path) -> Build:
    """Compiles and takes apart; intermediate files go to `folder`. `source`: of csrc/cuda, or the path of another."""
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(source) if source.endswith(".cu") else CSRC / "cuda" / f"{source}.cu"
    cubin = folder / f"{path.stem}.cubin"
    keep = ["--keep", "--keep-dir", folder, "-Xptxas=-v"]
    remarks = output(tools.nvcc, *tools.flags[arch], *keep, "-cubin", "-o", cubin, path)
    preprocessed = (folder / f"{path.stem}.cpp1.ii").read_text(errors="replace")
    return Build(
        source,
        arch,
        (folder / f"{path.stem}.ptx").read_text(),
        set(re.findall(r'^# \d+ "([^"<]+)"', preprocessed, re.MULTILINE)),
        sass.parse(output(tools.nvdisasm, "-c", cubin)),
        resources(output(tools.cuobjdump, "--dump-resource-usage", cubin), remarks),
    )


def build_all(tools: Tools, sources: Iterable[str], archs: Iterable[str], workers: int = 2) -> list[Build]:
    """Architecture by architecture, `workers` compilers at a time."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(build, tools, source, arch, Path(folder) / f"{source}_{arch}")
            for arch in archs
            for source in sources
        ]
        return [job.result() for job in jobs]
