"""The numbers of a diffusion: schedules, spacings and the rows of step tables.

No module here calls a real model. Only tracing (trace.py) has samples, which are random numbers. This package exports
the names that options such as `sampler` and `spacing` accept; the modules of its imports say what each name means.
"""

from ddpm_ext.tables.predictions import PREDICTIONS, SPACED_PREDICTIONS
from ddpm_ext.tables.samplers import SAMPLERS, WITH_ETA
from ddpm_ext.tables.schedules import SCHEDULES
from ddpm_ext.tables.spacing import SPACINGS
from ddpm_ext.tables.variances import TRAINABLE_VARIANCES, VARIANCES
from ddpm_ext.tables.weightings import WEIGHTINGS

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACED_PREDICTIONS",
    "SPACINGS",
    "TRAINABLE_VARIANCES",
    "VARIANCES",
    "WEIGHTINGS",
    "WITH_ETA",
]
