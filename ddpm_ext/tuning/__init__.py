"""Fewer calls of the model: step tables that are fitted to it."""

from ddpm_ext.tuning.names import Named
from ddpm_ext.tuning.report import Report
from ddpm_ext.tuning.tuner import Tuned, Tuner, tune

__all__ = ["Named", "Report", "Tuned", "Tuner", "tune"]
