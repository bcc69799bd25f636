"""Builds the library that runs the CUDA kernels on the CPU, by g++ and with a stand-in for CUDA's runtime."""

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

GIVEN_BY = "DDPM_EXT_TEST_CUDA_HOST"  # the environment variable with the path of a built library to test
GIVEN = os.environ.get(GIVEN_BY, "")
SANITIZED = Path(GIVEN).parent.name == "sanitized"

KERNELS = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "host.cpp", FOLDER / "probe.cu"]
RUNTIME = [FOLDER / name for name in ("scheduler.cpp", "fiber.cpp", "faults.cpp", "sectors.cpp")]
# Without library.cpp: a process can register operators with torch only once, and ddpm_ext._C has registered them.
TORCH = [*sorted(p for p in CSRC.glob("ops/*.cpp") if p.name != "library.cpp"), FOLDER / "module.cpp"]

# Makes the compiled code trap at undefined behaviour, as far as g++ can detect it. The stand-in catches the trap.
TRAPS = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
COMPILER = [*filter(None, [shutil.which("ccache")]), "g++"]  # with ccache, unchanged sources are compiled only once
# Detects only memory errors. The other build detects undefined behaviour, and with both checks this build would take
# two thirds longer.
SANITIZERS = ["-fsanitize=address", "-O0", "-g1"]


def why_not() -> str | None:
    """The reason why the library cannot be built on this machine, or None if it can."""
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
    # With -Og the kernels and their traps compile in half the time of -O1, and run as fast.
    flags = ["-Og", "-std=c++20", "-fPIC", *load_setup().HOST_FLAGS, f"-I{FOLDER}", f"-I{FOLDER / 'include'}"]
    flags += [f"-I{CSRC}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    flags += [f"-isystem{sysconfig.get_paths()['include']}", "-DTORCH_EXTENSION_NAME=operators"]
    flags += [f'-DDDPM_EXT_TORCH_VERSION="{torch.__version__}"']
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    # Flags for the CUDA sources. The kernels load floats as words of other types, which breaks C++'s strict aliasing.
    # nvcc allows that.
    cuda = ["-x", "c++", "-include", "cuda_runtime.h", "-D__CUDACC__", "-fno-strict-aliasing"]
    # From compute capability 10.0 (1000) on, an instruction processes two elements. So the two builds test both
    # versions of that code.
    cuda.append(f"-D__CUDA_ARCH__={1000 if sanitizers else 900}")

    def compile_one(source: Path) -> Path:
        target = object_file(source, folder)
        source_flags = [*cuda, *(sanitizers or TRAPS)] if source in KERNELS else sanitizers
        run(*COMPILER, *flags, *source_flags, "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        return list(pool.map(compile_one, sources))


def link(objects: Iterable[Path], target: Path, sanitizers: list[str]) -> Path:
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += [f"-l{name}" for name in ("torch_python", "torch", "torch_cpu", "c10")]
    run("g++", "-shared", *sanitizers, *objects, *libraries, "-o", target)
    return target


def build(folder: Path) -> Path:
    """Builds the library with traps for undefined behaviour, and returns its path."""
    return link(compile_all([*KERNELS, *RUNTIME, *TORCH], folder, []), folder / "host.so", [])


def build_sanitized(plain: Path) -> Path:
    """Builds the library with AddressSanitizer. The objects that use torch are those of the library `plain`."""
    folder = plain.parent / "sanitized"
    folder.mkdir()
    objects = compile_all([*KERNELS, *RUNTIME], folder, SANITIZERS)
    objects += [object_file(source, plain.parent) for source in TORCH]
    return link(objects, folder / "host.so", SANITIZERS)


def sanitizer_libraries() -> list[str]:
    """The libraries that Python must preload to load the sanitized library, or [] if g++ does not have them."""
    commands = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    found = [subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in commands]
    return found if all(os.path.isabs(path) for path in found) else []


def sanitized_environment(sanitized: Path) -> dict[str, str]:
    """Environment variables for a Python process that tests the sanitized library."""
    options = "detect_leaks=0:protect_shadow_gap=0"  # Python never frees some memory; a CUDA driver needs the gap
    sanitizer = {"LD_PRELOAD": " ".join(sanitizer_libraries()), "ASAN_OPTIONS": options}
    return {**os.environ, **sanitizer, "CUDA_VISIBLE_DEVICES": "", GIVEN_BY: str(sanitized)}


def for_session(folder: Path) -> Path:
    """The library of a test session: the one that the environment names, or else one that is built in `folder`.

    Skips the test if this machine cannot build a library.
    """
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
