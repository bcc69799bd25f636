"""Builds `ddpm_ext._C`: CPU kernels always, and CUDA kernels if torch has CUDA and a matching nvcc is installed.

Environment variables:
- DDPM_EXT_CUDA: 0 builds without CUDA, 1 fails if CUDA can't be built; unset builds it if possible
- CUDA_HOME, or else CUDA_PATH: the CUDA toolkit; without both, the toolkit of the `nvcc` on PATH
- TORCH_CUDA_ARCH_LIST: GPU architectures, such as "8.0;9.0+PTX"; "all" for a wheel that runs on all cards; unset takes
  the architectures of the visible GPUs, or 8.0 if no GPU is visible
- CXX: the C++ compiler; unset takes c++
- MAX_JOBS: how many compilers run at once
- DDPM_EXT_SANITIZE: the value of g++'s -fsanitize, such as "address,undefined", for `make sanitize`
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup

MODULE = "ddpm_ext._C"
OLDEST_TORCH = (2, 7)
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
WITHOUT_CARD = (
    "8.0"  # newer GPUs run its PTX, and it is the oldest architecture with instructions that convert bfloat16
)
LICENSE = "Apache-2.0"  # not in pyproject.toml: setuptools before 77 and from 77 on accept no common form there
INSTALL = "pip install --no-build-isolation ."

# Contraction, or any flag that lets the compiler reorder arithmetic, would change the bits of the noise. No -march: the
# instruction set is chosen at run time. No -fopenmp: csrc/cpu/parallel.h explains how kernels use torch's threads.
HOST_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX_FLAGS = ["-O3", "-g0", *HOST_FLAGS, "-Wall"]
# These flags interleave long chains of vector instructions. With g++ 12 the first two make drawing noise a seventh
# faster; the last two make it another twentieth faster with AVX2. Some compilers don't know these flags.
TUNING_FLAGS = [
    "-fschedule-insns",
    "-fira-region=all",
    "-fsched-pressure",
    "--param=sched-pressure-algorithm=2",
]
NVCC_FLAGS = ["-O3", "-fmad=false", f"-Xcompiler={','.join(HOST_FLAGS)}"]
# The kernels' source differs only between these architectures (__CUDA_ARCH__ in csrc/cuda). So all architectures from
# one of them up to the next are compiled from one PTX, since making PTX takes most of nvcc's time;
# docs/developers/cuda.md compares the machine code.
PTX_ARCHS = (75, 80, 100)

# Commands of setuptools that compile. Other commands (sdist, metadata) need no torch.
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


class Toolkit(NamedTuple):
    """A CUDA toolkit, its version, and the architectures that its nvcc compiles for.

    If home is None, no toolkit was found, and `problem` says why.
    """

    home: str | None
    version: str = ""
    archs: Collection[str] = ()
    problem: str = ""


class Plan(NamedTuple):
    """The CUDA toolkit to build with; None: build without CUDA, for the reason `why_cpu`."""

    toolkit: Toolkit | None
    why_cpu: str = ""


def fail(message: str) -> NoReturn:
    sys.exit(f"ddpm_ext: {message}")


def ask(*command: str) -> str:
    """The output of a command, stdout and stderr together; empty if the command fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def has_nvcc(home: str | os.PathLike[str]) -> bool:
    return (Path(home) / "bin" / "nvcc").is_file()


def home_behind(nvcc: str) -> str | None:
    """The folder of the toolkit that an nvcc belongs to. If nvcc is a wrapper script, its --dryrun shows the folder."""
    here = re.search(r"^#\$ _HERE_=(.+)$", ask(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE)
    bins = [Path(here[1].strip())] if here else []
    for folder in [*bins, Path(nvcc).resolve().parent]:
        home = os.path.normpath(folder.parent)
        if folder.name == "bin" and has_nvcc(home):
            return home
    return None


def find_toolkit(env: Mapping[str, str]) -> Toolkit:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            home = env[name]
            if not has_nvcc(home):
                return Toolkit(None, problem=f"{name}={home} has no bin/nvcc")
            break
    else:
        nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
        if nvcc is None:
            return Toolkit(None, problem="there is no nvcc on PATH and CUDA_HOME is not set")
        home = home_behind(nvcc)
        if home is None:
            return Toolkit(None, problem=f"{nvcc} does not say where its CUDA toolkit is and CUDA_HOME is not set")
    nvcc = str(Path(home) / "bin" / "nvcc")
    release = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
    if release is None:
        return Toolkit(None, problem=f"{nvcc} --version fails")
    codes = re.findall(r"\bsm_(\d+)(\d)\b", ask(nvcc, "--list-gpu-code"))
    return Toolkit(home, release[1], [f"{major}.{minor}" for major, minor in codes])


def make_plan(env: Mapping[str, str], torch_version: str, torch_cuda: str | None) -> Plan:
    """Decides whether to build with CUDA. Ends the build if DDPM_EXT_CUDA is 1 and CUDA can't be built, or if its value
    is unknown."""
    wish = env.get("DDPM_EXT_CUDA", "")
    if wish not in ("", "0", "1"):
        fail(f"DDPM_EXT_CUDA={wish} is unknown: 0 leaves CUDA out, 1 demands it, unset takes it where it can be had")
    if wish == "0":
        return Plan(None, "DDPM_EXT_CUDA=0")
    toolkit = Toolkit(None)
    if torch_cuda is None:
        why = f"torch {torch_version} is built without CUDA"
        remedy = "install a torch with CUDA (pip install --upgrade --force-reinstall torch), then build again"
    else:
        toolkit = find_toolkit(env)
        major = torch_cuda.split(".")[0]
        remedy = f"point CUDA_HOME at a CUDA {major} toolkit: CUDA_HOME=/path/to/cuda-{major} {INSTALL}"
        why = toolkit.problem
        if toolkit.home and toolkit.version.split(".")[0] != major:
            why = f"nvcc is of CUDA {toolkit.version} and torch {torch_version} of CUDA {torch_cuda}"
    if not why:
        return Plan(toolkit)
    if wish == "1":
        fail(f"DDPM_EXT_CUDA=1, but {why}; {remedy}")
    return Plan(None, why)


def choose_archs(wish: str, known: Collection[str], cards: Collection[tuple[int, int]]) -> tuple[str, str]:
    """The architectures to compile for, and a phrase that explains the choice.

    wish: TORCH_CUDA_ARCH_LIST. known: the architectures that nvcc and torch both know. cards: the visible GPUs'
    capabilities. Unless `wish` lists architectures, the result includes PTX of the last one, which later GPUs can run.
    """
    if wish not in ("", "all"):
        return wish.replace(";", " "), "as you chose"
    ours = [arch for arch in ARCHS if arch in known]
    if not ours:
        fail(f"nvcc and torch share none of the architectures {' '.join(ARCHS)}; set TORCH_CUDA_ARCH_LIST")
    if wish == "all":
        return " ".join(ours) + "+PTX", "for all cards"
    able = sorted(tuple(map(int, arch.split("."))) for arch in known)
    fitting = sorted({max(arch for arch in able if arch <= card) for card in cards if card >= able[0]})
    if fitting:
        return " ".join(f"{major}.{minor}" for major, minor in fitting) + "+PTX", "for the visible cards"
    return (WITHOUT_CARD if WITHOUT_CARD in ours else ours[0]) + "+PTX", "as no card is visible"


def torch_knows(arch: str) -> bool:
    """Whether torch's build helper accepts an architecture. Torch has no public list of architectures."""
    from torch.utils import cpp_extension

    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    try:
        return bool(cpp_extension._get_cuda_arch_flags())
    except ValueError:
        return False
    finally:
        if before is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before


def check_torch():
    """Returns the torch module. If it is missing or too old, ends the build with the command that installs it."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        fail(f"torch is needed to build; pip install torch setuptools wheel ninja pybind11, then {INSTALL}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        fail(f"torch {torch.__version__} is too old; pip install 'torch>={oldest}', then {INSTALL}")
    return torch


def files(*patterns: str) -> list[str]:
    """The files under csrc that match, as paths relative to this folder, which setuptools requires."""
    root = Path(__file__).resolve().parent
    return sorted(path.relative_to(root).as_posix() for p in patterns for path in (root / "csrc").glob(p))


def sources(cuda: bool) -> list[str]:
    return files("ops/*.cpp", "cpu/**/*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if cuda else []))


def nvcc_flags(version: str, arch_flags: Collection[str]) -> list[str]:
    """nvcc's flags. version: nvcc's. arch_flags: torch's flags for the architectures."""

    def of_one_ptx(match: re.Match[str]) -> str:
        return f"compute_{max((arch for arch in PTX_ARCHS if arch <= int(match[1])), default=match[1])}"

    # Drivers older than CUDA 12.4 can't read what --compress-mode=size writes, but CUDA 13 doesn't support them anyway.
    small = "--compress-mode=size" if int(version.split(".")[0]) >= 13 else "-Xfatbin=-compress-all"
    return [*NVCC_FLAGS, small, *(re.sub(r"compute_(\d+)\b", of_one_ptx, flag) for flag in arch_flags)]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def known_flags(flags: Collection[str]) -> list[str]:
    """The flags that the C++ compiler accepts without a warning."""
    command = [*compiler(), "-Werror", "-fsyntax-only", "-x", "c++", os.devnull]
    return [flag for flag in flags if succeeds(*command, flag)]


def macro(name: str, text: str) -> str:
    return f'-D{name}="{text}"'


def configure():
    """Returns the extension and the command that builds it, for the installed torch."""
    torch = check_torch()
    plan = make_plan(os.environ, torch.__version__, torch.version.cuda)
    info = {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    info |= {"cuda": None, "archs": "", "why_cpu": plan.why_cpu}
    if plan.toolkit:
        os.environ["CUDA_HOME"] = str(plan.toolkit.home)  # torch reads this when cpp_extension is imported
    add_ninja_to_path()
    from torch.utils import cpp_extension

    if plan.toolkit:
        cpp_extension.CUDA_HOME = plan.toolkit.home
        archs, why = choose_archs(
            os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            [arch for arch in plan.toolkit.archs if torch_knows(arch)],
            [torch.cuda.get_device_capability(card) for card in range(torch.cuda.device_count())],
        )
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        info |= {"cuda": plan.toolkit.version, "archs": archs}
        print(f"ddpm_ext: CPU and CUDA kernels, nvcc {info['cuda']} for {archs}, {why} (TORCH_CUDA_ARCH_LIST)")
    else:
        print(f"ddpm_ext: CPU kernels only: {plan.why_cpu}")

    cxx = [*CXX_FLAGS, *known_flags(TUNING_FLAGS), macro("DDPM_EXT_TORCH_VERSION", torch.__version__)]
    if plan.toolkit:
        cxx += [macro("DDPM_EXT_CUDA_VERSION", info["cuda"]), macro("DDPM_EXT_CUDA_ARCHS", info["archs"])]
    nvcc = nvcc_flags(plan.toolkit.version, cpp_extension._get_cuda_arch_flags()) if plan.toolkit else []
    link = ["-Wl,-s"] if sys.platform == "linux" else []  # stripping symbols makes the module a twentieth smaller
    if os.environ.get("DDPM_EXT_SANITIZE"):
        link = [f"-fsanitize={os.environ['DDPM_EXT_SANITIZE']}", "-fno-sanitize-recover=undefined"]
        cxx = [flag for flag in cxx if flag not in TUNING_FLAGS] + [*link, "-O0", "-g1"]
    make = cpp_extension.CUDAExtension if plan.toolkit else cpp_extension.CppExtension
    extension = make(
        MODULE,
        sources(cuda=plan.toolkit is not None),
        include_dirs=[str(Path(__file__).resolve().parent / "csrc")],
        depends=files("**/*.h", "**/*.cuh", "**/*.def"),
        define_macros=[("DDPM_EXT_WITH_CUDA", None)] if plan.toolkit else [],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
    )
    # -isystem turns off warnings in torch's headers: g++ ignores -I for a folder that is also named by -isystem.
    cxx += [f"-isystem{folder}" for folder in extension.include_dirs[1:]]

    class BuildExt(cpp_extension.BuildExtension):
        """Also writes a .json file with the versions that the module was built for, next to the module.

        `ddpm_ext.ops.extension` reads the file before it loads the module.
        """

        def run(self):
            self.force = True  # otherwise a build without ninja would not notice a change of torch or of flags
            if self.inplace:  # not pip's temporary folder, where each editable build would compile all files again
                self.build_temp = f"build/temp.{sys.platform}-{sys.implementation.cache_tag}"
            super().run()
            # get_ext_fullpath depends on self.inplace. A build in place leaves a module in the build folder, too.
            for in_place in {False, bool(self.inplace)}:
                self.inplace, before = in_place, self.inplace
                Path(self.get_ext_fullpath(MODULE)).with_suffix(".json").write_text(json.dumps(info, indent=1) + "\n")
                self.inplace = before

    return extension, BuildExt


def add_ninja_to_path() -> None:
    """Puts ninja on PATH, where torch looks for it. If pip is called by its path, its bin folder is not on PATH."""
    try:
        import ninja
    except ModuleNotFoundError:
        return
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


def requirements(commands: Collection[str]) -> list[str]:
    """The packages that are needed at run time. A compiled module needs the torch that it was compiled for; the sources
    work with any supported torch."""
    torch = ">=" + ".".join(map(str, OLDEST_TORCH))
    if not (COMPILING | {"dist_info"}).isdisjoint(commands):  # dist_info makes the metadata of the wheel to be built
        with suppress(metadata.PackageNotFoundError):
            torch = f"=={'.'.join(metadata.version('torch').split('.')[:2])}.*"
    return [f"torch{torch}", "numpy"]


def main() -> None:
    options = {"license": LICENSE, "install_requires": requirements(sys.argv)}
    if COMPILING.isdisjoint(sys.argv):
        setup(**options, ext_modules=[Extension(MODULE, sources(cuda=True))])
    else:
        extension, build_ext = configure()
        setup(**options, ext_modules=[extension], cmdclass={"build_ext": build_ext})


if __name__ == "__main__":
    main()
