"""Compiles the CUDA sources by g++ against the stand-in for CUDA's runtime, into a module that runs them on the CPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from benchmarks.static.compiler import load_setup

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[2]
CSRC = ROOT / "csrc"

GIVEN_BY = "DDPM_EXT_TEST_CUDA_HOST"  # names a built library to test instead of building one
GIVEN = os.environ.get(GIVEN_BY, "")
SANITIZED = Path(GIVEN).parent.name == "sanitized"

KERNELS = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "host.cpp", FOLDER / "probe.cu"]
RUNTIME = [FOLDER / name for name in ("scheduler.cpp", "fiber.cpp", "faults.cpp", "sectors.cpp")]
# Without library.cpp, since a process can register its operators only once and ddpm_ext's own module has done so.
TORCH = [*sorted(p for p in CSRC.glob("ops/*.cpp") if p.name != "library.cpp"), FOLDER / "module.cpp"]

# All undefined behaviour that g++ can detect. A trap's instruction is a fault, which the stand-in catches.
TRAPS = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
COMPILER = [*filter(None, [shutil.which("ccache")]), "g++"]  # ccache: unchanged sources are compiled only once
# Only memory errors: checking undefined behaviour too, which the traps find, would compile two thirds longer.
SANITIZERS = ["-fsanitize=address", "-O0", "-g1"]


def why_not() -> str | None:
    """The reason why the library can't be built on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return f"the stand-in for CUDA's runtime is for Linux, this is {sys.platform}"
    return None if shutil.which("g++") else "there is no g++ on PATH"


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


def object_file(source: Path, folder: Path) -> Path:
    return folder / f"{source.parent.name}_{source.name}.o"


def compile_all(sources: Iterable[Path], folder: Path, sanitizers: list[str]) -> list[Path]:
    flags = ["-O1", "-std=c++20", "-fPIC", *load_setup().HOST_FLAGS, f"-I{FOLDER}", f"-I{FOLDER / 'include'}"]
    flags += [f"-I{CSRC}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    flags += [f"-isystem{sysconfig.get_paths()['include']}", "-DTORCH_EXTENSION_NAME=operators"]
    flags += [f'-DDDPM_EXT_TORCH_VERSION="{torch.__version__}"']
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    # Like nvcc for a GPU. The kernels load floats as other types, which breaks strict aliasing; nvcc allows that.
    cuda = ["-x", "c++", "-include", "cuda_runtime.h", "-D__CUDACC__", "-fno-strict-aliasing"]
    # Both values are tested: from 1000 on, two elements share an instruction.
    cuda.append(f"-D__CUDA_ARCH__={1000 if sanitizers else 900}")

    def compile_one(source: Path) -> Path:
        target = object_file(source, folder)
        own = [*cuda, *(sanitizers or TRAPS)] if source in KERNELS else sanitizers
        run(*COMPILER, *flags, *own, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        return list(pool.map(compile_one, sources))


def link(objects: Iterable[Path], target: Path, sanitizers: list[str]) -> Path:
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += [f"-l{name}" for name in ("torch_python", "torch", "torch_cpu", "c10")]
    run("g++", "-shared", *sanitizers, *objects, *libraries, "-o", target)
    return target


def build(folder: Path) -> Path:
    """Builds the library, in which undefined behaviour traps."""
    return link(compile_all([*KERNELS, *RUNTIME, *TORCH], folder, []), folder / "host.so", [])


def build_sanitized(plain: Path) -> Path:
    """Builds the library with AddressSanitizer. Objects that use torch come from the plain library's folder."""
    folder = plain.parent / "sanitized"
    folder.mkdir()
    objects = compile_all([*KERNELS, *RUNTIME], folder, SANITIZERS)
    objects += [object_file(source, plain.parent) for source in TORCH]
    return link(objects, folder / "host.so", SANITIZERS)


def sanitizer_libraries() -> list[str]:
    """The libraries that Python must preload to load the sanitized library. Empty if g++ lacks them."""
    commands = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    found = [subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in commands]
    return found if all(os.path.isabs(path) for path in found) else []


def sanitized_environment(sanitized: Path) -> dict[str, str]:
    """Environment variables for a Python process that tests the sanitized library."""
    options = "detect_leaks=0:protect_shadow_gap=0"  # Python leaks; a CUDA driver needs the shadow gap
    sanitizer = {"LD_PRELOAD": " ".join(sanitizer_libraries()), "ASAN_OPTIONS": options}
    return {**os.environ, **sanitizer, "CUDA_VISIBLE_DEVICES": "", GIVEN_BY: str(sanitized)}


def for_session(folder: Path) -> Path:
    """The library that all tests share: built in a session's folder, unless the environment names one."""
    if GIVEN:
        return Path(GIVEN)
    if problem := why_not():
        pytest.skip(problem)
    folder = folder / "cuda_host"
    folder.mkdir()
    return build(folder)


def load(library: Path, name: str) -> ModuleType:
    """Loads one of the library's two modules, "operators" and "control"."""
    loader = ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
