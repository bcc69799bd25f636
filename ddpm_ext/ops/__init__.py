"""The operators: one kernel launch each, and a twin of each in plain torch (`reference`). They know no diffusion.

Eager calls go through pybind11, compiled ones through torch.ops.ddpm_ext; `fused` has both.
"""

from ddpm_ext.ops.fused import (
    check_reverse_step,
    diffusion_loss,
    extended_step,
    forward_process,
    linear_step,
    output_scale,
    posterior_mean,
    predict_start,
    randn,
    reverse_step,
    x_start_scale,
)

__all__ = [
    "check_reverse_step",
    "diffusion_loss",
    "extended_step",
    "forward_process",
    "linear_step",
    "output_scale",
    "posterior_mean",
    "predict_start",
    "randn",
    "reverse_step",
    "x_start_scale",
]
