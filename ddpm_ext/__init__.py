"""Gaussian diffusion with one kernel launch a step. A sample's noise depends on seed and id, not on device or batch."""

from __future__ import annotations

from ddpm_ext import reference
from ddpm_ext.diffusion import GaussianDiffusion
from ddpm_ext.integrations import accelerate
from ddpm_ext.loop.guidance import Guidance
from ddpm_ext.loop.inpaint import Inpaint
from ddpm_ext.loop.interpolation import Interpolation
from ddpm_ext.ops.noise import Philox, randn
from ddpm_ext.ops.result_memory import memory_info, release_memory
from ddpm_ext.process.clip import DynamicThreshold
from ddpm_ext.tables.step_table import StepTable
from ddpm_ext.version import __version__ as __version__
from ddpm_ext.version import build_info

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
    "memory_info",
    "randn",
    "reference",
    "release_memory",
]
