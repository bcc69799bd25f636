"""The operators in plain torch, under their public path: see ddpm_ext.ops.reference."""

from ddpm_ext.ops.philox import philox4x32
from ddpm_ext.ops.reference import (
    diffusion_loss,
    forward_process,
    output_scale,
    posterior_mean,
    predict_start,
    randn,
    reverse_step,
    step_with_options,
    x_start_scale,
)

__all__ = [
    "diffusion_loss",
    "forward_process",
    "output_scale",
    "philox4x32",
    "posterior_mean",
    "predict_start",
    "randn",
    "reverse_step",
    "step_with_options",
    "x_start_scale",
]
