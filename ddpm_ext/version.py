"""The version of ddpm_ext, how it was built, and whether it can use a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ddpm_ext.ops.cards import lacks_code_for
from ddpm_ext.ops.extension import BUILT, C


def _version() -> str:
    """The version of the installed package.

    For a source folder that was never installed, it is pyproject.toml's version with "+source"; for a copy of the
    package without pyproject.toml, "0+unknown".
    """
    import re
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("ddpm-ext")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    match = re.search(r'^name = "ddpm-ext"\nversion = "(.+?)"', text, re.MULTILINE)
    return f"{match[1]}+source" if match else "0+unknown"


__version__ = _version()


def build_info() -> dict[str, Any]:
    """How ddpm_ext was built, and the CPU instructions that it uses.

    Returns:
        version: the version of ddpm_ext.
        torch: the version of torch for which it was built.
        cuda: the version of the CUDA toolkit, or None.
        cuda_architectures: the GPU architectures for which it was built, or "".
        why_cpu: why it was built without CUDA, or "".
        compiler: the C++ compiler.
        cpu: the CPU instruction set in use, "avx512", "avx2", "sse2", "neon" or "portable".

    Examples:
        >>> instruction_set, cuda_toolkit = build_info()["cpu"], build_info()["cuda"]
    """
    return {"version": __version__, **C.build_info(), "why_cpu": BUILT["why_cpu"]}


def why_no_gpu() -> str:
    """The reason, in words, why ddpm_ext or torch can't use a GPU; "" if they can."""
    built = build_info()
    if built["cuda"] is None:
        return f"ddpm_ext is built without CUDA: {built['why_cpu']}"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch {torch.__version__} can use no GPU: {' '.join(str(error).split()).partition('. ')[0]}"
    return lacks_code_for(torch.cuda.current_device())


def default_device() -> str:
    """The default device of commands and training: "cuda" if ddpm_ext and torch can use a GPU, or "cpu".

    Warns if there is a GPU and ddpm_ext was built with CUDA, but without code for this GPU.
    """
    if C.build_info()["cuda"] is None or not torch.cuda.is_available():
        return "cpu"
    why = lacks_code_for(torch.cuda.current_device())
    if why:
        warnings.warn(f"device is cpu, since {why}", stacklevel=2)
    return "cpu" if why else "cuda"
