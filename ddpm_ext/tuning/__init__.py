"""Step tables that are fitted to a model, so that a loop needs fewer calls of the model."""

from ddpm_ext.tuning.names import Named
from ddpm_ext.tuning.report import Report
from ddpm_ext.tuning.tuner import Tuned, Tuner, tune

__all__ = ["Named", "Report", "Tuned", "Tuner", "tune"]
