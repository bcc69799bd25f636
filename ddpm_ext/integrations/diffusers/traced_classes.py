"""Lists for the schedulers of diffusers 0.42.1: exceptional classes, what steps write, and what is fused of them.

NOT_TRACED is only for the printed support table, and a test checks it. Tracing does not read it, but tries every class.
"""

from __future__ import annotations

from ddpm_ext.integrations.shared import Support

# If the model's output has extra channels, for a learned variance, these classes read only its first three channels.
OF_THREE_CHANNELS = (
    "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler",
)  # fmt: skip
# The attributes that steps of diffusers' classes write. A user's step that writes other attributes is not replaced by
# rows: rows write none of the tensors that a step stores, and the user's program may read them.
STORED = {
    "_init_size", "_step_index", "counter", "cur_sample", "derivatives", "dt", "ets", "last_noise", "last_sample",
    "lower_order_nums", "model_outputs", "prev_derivative", "sample", "sigma_data", "this_corrector_order",
    "this_order", "this_predictor_order", "timestep_list",
}  # fmt: skip
# {reason: the classes that run their own code, because they cannot be traced}
NOT_TRACED = {
    "a Brownian path's noise": ("CosineDPMSolverMultistep", "DPMSolverSDE"),
    "samples that are integers": ("Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"),
    "options that are tensors of other shapes": ("HeliosDMD",),
    "a mask that a step multiplies by": ("RFD4Proteina", "RePaint"),
    "a step without a timestep and three results": ("KarrasVe",),
    "a result of more tensors": ("Helios",),
    "an output of other channels": ("Piflow",),
}
SUPPORT = (
    Support(
        "any other scheduler",
        "step, or step_pred",
        "traced: what is linear in sample, output, noise and three more tensors, from history or options; other "
        "options are numbers or strings; thresholding; every class of diffusers 0.42.1 by default, but those on the "
        "right",
        "PNDM's Runge-Kutta steps; learned variances; float64; gradients; "
        + "; ".join(f"{reason} ({', '.join(names)})" for reason, names in NOT_TRACED.items()),
    ),
    Support(
        "any other scheduler",
        "scale_model_input",
        "the previous step's result: that step has already written it scaled; another tensor, such as a doubled batch: "
        "one product",
        "before the first step of a loop; float64; a class that does more than multiply by a number",
    ),
    Support(
        "any other scheduler",
        "add_noise, scale_noise, get_velocity",
        "float32, float16, bfloat16; a timestep a sample, looked up on its device; gradients",
        "float64; samples that are broadcast; FlowMatchHeunDiscrete, ScoreSdeVe",
    ),
)


def is_scheduler(cls: type) -> bool:
    """Whether a class is one of diffusers' schedulers, or derived from one."""
    home = "diffusers.schedulers.scheduling_utils"
    return any((base.__module__, base.__name__) == (home, "SchedulerMixin") for base in cls.__mro__)
