"""The operators, each of one kernel launch. `reference` has a twin of each, made of torch's operators.

They take tables of numbers, and do not depend on schedules. Eager calls go through pybind11. Calls that torch.compile
or torch.jit.trace traces, and all calls of randn, go through torch.ops.ddpm_ext. The functions in `fused` choose.
"""

from ddpm_ext.ops.fused import (
    TableStep,
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
    "TableStep",
    "diffusion_loss",
    "forward_process",
    "output_scale",
    "posterior_mean",
    "predict_start",
    "randn",
    "reverse_step",
    "step_with_options",
    "x_start_scale",
]
