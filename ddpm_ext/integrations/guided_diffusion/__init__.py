"""The mixins for guided-diffusion (Dhariwal & Nichol 2021) and improved-diffusion (Nichol & Dhariwal 2021).

A step takes one launch, with a denoised_fn mostly two. Both libraries compute the same steps; guided-diffusion's
methods also have an argument cond_fn. In these files, "the library" is either of the two, and variables named `peer`
are objects of its classes.
"""

from ddpm_ext.integrations.guided_diffusion.classes import Guided, Improved, ImprovedSpaced, Spaced
from ddpm_ext.integrations.shared import Support

__all__ = ["SUPPORT", "Guided", "Improved", "ImprovedSpaced", "Spaced"]

SUPPORT = tuple(
    Support("guided_diffusion, improved_diffusion", *row)
    for row in (
        ("q_sample", "float32, with gradients", "other dtypes; torch.func"),
        (
            "p_sample",
            "float32; every mean and variance type; clip, cond_fn; respaced and rescaled timesteps; denoised_fn, with "
            "a second launch except for START_X; a model's output of 16 bits, except for START_X",
            "other dtypes; torch.func; gradients through a step; alphas_cumprod that reach 0; tables that do not "
            "follow from the betas; a denoised_fn or cond_fn whose result has another shape; a denoised_fn whose "
            "result has another dtype",
        ),
        ("p_sample_loop, p_sample_loop_progressive", "as p_sample", "as p_sample"),
        (
            "ddim_sample",
            "as p_sample; eta from 0 on",
            "as p_sample; an eta that is negative, or asks for more noise than there is; float64 from a cond_fn",
        ),
        ("ddim_sample_loop, ddim_sample_loop_progressive", "as ddim_sample", "as ddim_sample"),
        ("ddim_reverse_sample", "as p_sample", "as p_sample"),
        (
            "training_losses",
            "float32; every loss, mean and variance type, by a launch for x_t, one for the error and one for the "
            "variational bound; a second derivative is refused; else as p_sample",
            "other dtypes; torch.func; gradients by x_start or noise; the bound's term at t = 0; else as p_sample",
        ),
        ("all others", "", "all"),
    )
)
