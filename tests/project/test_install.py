"""What setup.py decides, and what `ddpm_ext.ops.extension` says where there is no compiled module that fits."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.compilers import ROOT, find_compiler

from benchmarks.static.compiler import load_setup

BOTH = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
setup = load_setup()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def fake_toolkit(home: Path, version: str = "13.0", codes: str = "sm_75 sm_80 sm_90 sm_120") -> Path:
    """A folder with an nvcc that answers the three calls of setup.py."""
    script(
        home / "bin" / "nvcc",
        f"""case "$1" in
        --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
        --list-gpu-code) printf '%s\\n' {codes} ;;
        --dryrun) echo '#$ _SPACE_= '; echo '#$ _HERE_={home}/bin' >&2 ;;
        *) exit 1 ;; esac
        """,
    )
    return home


def on_path(folder: Path) -> dict[str, str]:
    return {"PATH": os.pathsep.join([str(folder), os.defpath])}


def test_cuda_home_comes_before_cuda_path_and_both_before_path(tmp_path):
    a, b, c = (fake_toolkit(tmp_path / version, version) for version in ("13.1", "13.2", "13.3"))
    path = on_path(c / "bin")
    assert setup.find_toolkit({"CUDA_HOME": str(a), "CUDA_PATH": str(b), **path}).home == str(a)
    assert setup.find_toolkit({"CUDA_PATH": str(b), **path}).home == str(b)
    assert setup.find_toolkit(path) == setup.Toolkit(str(c), "13.3", ["7.5", "8.0", "9.0", "12.0"])


def test_nvcc_on_path_may_stand_in_for_one_elsewhere(tmp_path):
    home = fake_toolkit(tmp_path / "real one" / "cuda")
    script(tmp_path / "bin" / "nvcc", f'exec {shlex.quote(str(home / "bin" / "nvcc"))} "$@"\n')
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(home / "bin" / "nvcc")
    for outside in ("bin", "links"):
        assert setup.find_toolkit(on_path(tmp_path / outside)).home == str(home)


def test_what_is_wrong_with_nvcc_is_named(tmp_path):
    assert "no nvcc on PATH" in setup.find_toolkit({"PATH": str(tmp_path)}).problem
    empty = setup.find_toolkit({"CUDA_HOME": str(tmp_path), **on_path(fake_toolkit(tmp_path / "cuda") / "bin")})
    assert empty.home is None and empty.problem == f"CUDA_HOME={tmp_path} has no bin/nvcc"
    script(tmp_path / "lost" / "nvcc", "exit 1\n")
    assert "does not say where" in setup.find_toolkit(on_path(tmp_path / "lost")).problem
    script(tmp_path / "broken" / "bin" / "nvcc", "exit 1\n")
    assert "--version fails" in setup.find_toolkit({"CUDA_HOME": str(tmp_path / "broken")}).problem


def test_zero_leaves_cuda_out_and_other_values_are_refused(tmp_path):
    env = {"CUDA_HOME": str(fake_toolkit(tmp_path, "13.0"))}
    for wish in ({}, {"DDPM_EXT_CUDA": ""}, {"DDPM_EXT_CUDA": "1"}):
        plan = setup.make_plan(env | wish, "2.15.0+cu132", "13.2")
        assert (plan.toolkit.home, plan.toolkit.version, plan.why_cpu) == (str(tmp_path), "13.0", "")
    assert setup.make_plan(env | {"DDPM_EXT_CUDA": "0"}, "2.15.0+cu132", "13.2") == (None, "DDPM_EXT_CUDA=0")
    for value in ("2", "01"):
        with pytest.raises(SystemExit, match=f"DDPM_EXT_CUDA={value} is unknown"):
            setup.make_plan({"DDPM_EXT_CUDA": value}, "2.15.0", "13.2")


@pytest.mark.parametrize(
    ("torch_version", "torch_cuda", "nvcc", "why", "remedy"),
    [
        ("2.13.0+cpu", None, "13.0", r"torch 2\.13\.0\+cpu is built without CUDA", "pip install .*torch"),
        ("2.15.0", "13.2", None, "no nvcc on PATH", "CUDA_HOME=.*-13 pip install --no-build-isolation"),
        ("2.9.1", "12.8", "13.0", r"CUDA 13\.0 and torch 2\.9\.1 of CUDA 12\.8", "CUDA_HOME=.*-12 pip install"),
    ],
)
def test_where_cuda_cannot_be_had(tmp_path, torch_version, torch_cuda, nvcc, why, remedy):
    env = {"PATH": str(tmp_path)} if nvcc is None else {"CUDA_HOME": str(fake_toolkit(tmp_path, nvcc))}
    plan = setup.make_plan(env, torch_version, torch_cuda)
    assert plan.toolkit is None
    with pytest.raises(SystemExit, match=f"DDPM_EXT_CUDA=1, but .*{why}.*{remedy}"):
        setup.make_plan(env | {"DDPM_EXT_CUDA": "1"}, torch_version, torch_cuda)
    assert re.search(why, plan.why_cpu)


def test_architectures():
    choose = lambda *given: setup.choose_archs(*given)[0]  # noqa: E731
    assert choose("8.9;9.0+PTX", BOTH, [(8, 0)]) == "8.9 9.0+PTX"
    assert choose("all", ["7.0", *BOTH, "12.1"], [(8, 0)]) == "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"
    assert choose("", [*BOTH, "12.1"], [(12, 1), (8, 9), (12, 1)]) == "8.9 12.1+PTX"
    assert choose("", ["8.0", "9.0"], [(12, 0), (8, 6), (6, 0)]) == "8.0 9.0+PTX"  # cards newer and older than nvcc
    assert (choose("", BOTH, []), choose("", ["8.6", "9.0"], [(7, 5)])) == ("8.0+PTX", "8.6+PTX")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        choose("", ["5.0"], [])
    assert setup.requirements(["setup.py", "sdist"]) == ["torch>=2.7", "numpy"]


def test_asking_torch_for_architectures_leaves_no_trace(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup.torch_knows("8.0") and not setup.torch_knows("1.2") and os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert setup.torch_knows("8.6") and "TORCH_CUDA_ARCH_LIST" not in os.environ


def test_no_flag_lets_a_compiler_reorder_arithmetic():
    flags = " ".join([*setup.CXX_FLAGS, *setup.NVCC_FLAGS])
    assert not re.search("fast.math|march|Ofast|unsafe-math|associative-math", flags)
    assert "-ffp-contract=off" in setup.CXX_FLAGS and "-fmad=false" in setup.NVCC_FLAGS


def test_one_ptx_for_several_architectures():
    """Torch's flags are given. Those older than ours stay as they are."""
    of_torch = [f"-gencode=arch=compute_{of}" for of in ("90,code=sm_90", "90,code=compute_90", "61,code=sm_61")]
    *_, size, binary, ptx, old = setup.nvcc_flags("13.0", of_torch)
    assert [binary, ptx, old] == [*(flag.replace("compute_90", "compute_80") for flag in of_torch[:2]), of_torch[2]]
    assert size == "--compress-mode=size" not in setup.nvcc_flags("12.9", [])


@pytest.mark.parametrize("name", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_every_compiler_takes_the_flags(name, monkeypatch):
    monkeypatch.setenv("CXX", find_compiler(name))
    flags = [*setup.CXX_FLAGS, *setup.known_flags(setup.TUNING_FLAGS)]
    assert setup.known_flags(flags) == flags


@pytest.mark.parametrize(
    ("torch", "says"),
    [
        ("None", "torch is needed to build; pip install torch "),
        ("types.SimpleNamespace(__version__='2.6.1+cu1')", "torch 2.6.1+cu1 is too old; pip install 'torch>=2.7'"),
    ],
)
def test_without_a_torch_that_will_do_the_build_ends_in_one_sentence(tmp_path, torch, says):
    code = f"import runpy, sys, types; sys.modules['torch'] = {torch}; sys.argv = ['setup.py', 'bdist_wheel']"
    code += f"\nrunpy.run_path({str(ROOT / 'setup.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"ddpm_ext: {says}") and done.stderr.count("\n") == 1


def fake_package(root: Path, torch: str, torch_cuda: str | None) -> Path:
    """A ddpm_ext of `ops.extension` alone, its command, and a torch that is but a version. Returns the package."""
    package = root / "ddpm_ext"
    (package / "ops").mkdir(parents=True)
    shutil.copy(ROOT / "ddpm_ext_command.py", root)
    shutil.copy(ROOT / "ddpm_ext" / "ops" / "extension.py", package / "ops")
    (package / "ops" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from ddpm_ext.ops.extension import BUILT, C\n")
    (package / "cli.py").write_text("def main(): ...\n")
    versions = f"__version__ = {torch!r}\nversion = types.SimpleNamespace(cuda={torch_cuda!r})\n"
    (root / "torch.py").write_text(f"import types\n{versions}")
    return package


def built_for(package: Path, torch: str, torch_cuda: str | None, cuda: str | None) -> None:
    (package / "_C.py").write_text("answer = 42\n")
    note = {"torch": torch, "torch_cuda": torch_cuda, "cuda": cuda, "archs": "", "why_cpu": ""}
    (package / "_C.json").write_text(json.dumps(note))


def import_error(root: Path, *path: Path) -> str:
    """What the command and the ImportError of `import ddpm_ext` say there, or "". path: more of sys.path."""
    code = "import ddpm_ext_command as command; command.main(); import ddpm_ext; assert ddpm_ext.C.answer == 42"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, root)))}
    done = subprocess.run([sys.executable, "-c", code, "info"], cwd=root, env=env, capture_output=True, text=True)
    assert "During handling" not in done.stderr and "direct cause" not in done.stderr
    if done.returncode == 0:
        return ""
    first, second, *_, last = done.stderr.strip().splitlines()
    assert last.startswith("ImportError: ddpm_ext") and second.startswith("Traceback")
    assert first == last.replace("ImportError", "ddpm-ext", 1)
    assert "pip install --no-build-isolation --force-reinstall --no-deps" in last
    return last


def test_without_a_module(tmp_path):
    """In a source folder the command installs in place."""
    package = fake_package(tmp_path, "2.15.0", None)
    python, says = f"{sys.version_info[0]}.{sys.version_info[1]}", import_error(tmp_path)
    assert f"no compiled module for Python {python} in {package}; run in" in says and says.endswith("--no-deps .")
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    assert import_error(tmp_path).endswith(f" -e {tmp_path}")


def test_a_source_folder_that_hides_what_is_installed_says_so(tmp_path):
    """After `pip install .`, a Python that is run in the same folder finds the sources first."""
    sources, site = tmp_path / "sources", tmp_path / "site-packages"
    fake_package(sources, "2.15.0", None)
    (sources / "setup.py").touch()
    (sources / "csrc").mkdir()
    built_for(fake_package(site, "2.15.0", None), "2.15.0", None, None)
    says = import_error(sources, site)  # `python -c` looks in the current folder before PYTHONPATH
    assert f"you stand in the source folder {sources}, " in says
    assert f"installed in {site / 'ddpm_ext'}; run Python in another folder (cd ..), or " in says
    assert says.endswith(f" -e {sources}")
    built_for(sources / "ddpm_ext", "2.15.0", None, None)  # compiled in place: nothing is hidden
    assert import_error(sources, site) == ""


@pytest.mark.parametrize(
    ("built", "now", "fits"),
    [
        (("2.14.0", None, None), ("2.15.0", None), False),
        (("2.15.0+cu132", "13.2", "13.0"), ("2.15.0+cpu", None), False),
        (("2.15.0+cu128", "12.8", "12.8"), ("2.15.0+cu132", "13.2"), False),
        (("2.15.0+cu132", "13.2", "13.0"), ("2.15.1+cu130", "13.0"), True),
        (("2.15.0+cpu", None, None), ("2.15.0+cu132", "13.2"), True),
    ],
)
def test_a_module_for_another_torch(tmp_path, built, now, fits):
    built_for(fake_package(tmp_path, *now), *built)
    says = import_error(tmp_path)
    assert (says == "") == fits
    assert fits or (f"compiled for torch {built[0]} " in says and f"this is torch {now[0]} " in says)


def test_a_module_that_does_not_load(tmp_path):
    package = fake_package(tmp_path, "2.15.0", None)
    built_for(package, "2.15.0", None, None)
    (package / "_C.py").unlink()
    compiled = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiled.write_bytes(b"\x7fELF cut short")
    assert "does not say what it was built for" in import_error(tmp_path)
    (package / "_C.json").rename(compiled.with_suffix(".json"))
    assert "does not load (" in import_error(tmp_path)
