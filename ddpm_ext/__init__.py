"""Each step of a Gaussian diffusion in one kernel launch, with the same noise for the same seed everywhere."""

from __future__ import annotations

from typing import Any

from ddpm_ext import reference
from ddpm_ext._extension import BUILT, C
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.guidance import Guidance
from ddpm_ext.images import Inpaint, Interpolation
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
    "build_info",
    "randn",
    "reference",
]

__version__ = "0.1.0"


def build_info() -> dict[str, Any]:
    """What this build is.

    Returns:
        version: of ddpm_ext; torch: it was built for; cuda: the toolkit, or None; cuda_architectures: built for, ""
        without CUDA; why_cpu: why there is no CUDA, "" with it; compiler; cpu: the CPU instruction set in use,
        "avx512", "avx2" or "portable".
    """
    return {"version": __version__, **C.build_info(), "why_cpu": BUILT["why_cpu"]}
