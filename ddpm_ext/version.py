"""Which version of ddpm_ext this is, and how it was built."""

from __future__ import annotations

from typing import Any

from ddpm_ext.ops.extension import BUILT, C

__all__ = ["__version__", "build_info"]


def _version() -> str:
    """pyproject.toml's, as it was when this was installed; with "+source" where a source folder is used that never was,
    and "0+unknown" where the package lies by itself.
    """
    import re
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("ddpm-ext")
    except metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.is_file() else ""
    found = re.search(r'^name = "ddpm-ext"\nversion = "(.+?)"', text, re.MULTILINE)
    return f"{found[1]}+source" if found else "0+unknown"


__version__ = _version()


def build_info() -> dict[str, Any]:
    """What this build is.

    Returns:
        version: of ddpm_ext; torch: it was built for; cuda: the toolkit, or None; cuda_architectures: built for, ""
        without CUDA; why_cpu: why there is no CUDA, "" with it; compiler; cpu: the CPU instruction set in use,
        "avx512", "avx2" or "portable".
    """
    return {"version": __version__, **C.build_info(), "why_cpu": BUILT["why_cpu"]}
