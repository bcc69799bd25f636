"""Each step of a Gaussian diffusion in one kernel launch, with the same noise for the same seed everywhere."""

from __future__ import annotations

from typing import Any

from ddpm_ext import reference
from ddpm_ext._extension import BUILT, C
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.guidance import Guidance
from ddpm_ext.images import Inpaint, Interpolation
from ddpm_ext.integrations import accelerate
from ddpm_ext.noise import Philox, randn
from ddpm_ext.step_table import StepTable
from ddpm_ext.thresholding import DynamicThreshold

__all__ = [
    "DynamicThreshold",
    "GaussianDiffusion",
    "Guidance",
    "Inpaint",
    "Interpolation",
    "Philox",
    "StepTable",
    "accelerate",
    "build_info",
    "randn",
    "reference",
]


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
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
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
