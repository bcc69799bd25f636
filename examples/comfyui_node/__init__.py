"""A node for ComfyUI that gives a SAMPLER: ddpm_ext's samplers, each step in one launch.

Copy this folder into ComfyUI's custom_nodes, with ddpm_ext installed in its environment. The node is under
sampling/custom_sampling/samplers, and its output goes into SamplerCustom or SamplerCustomAdvanced.

The noise is made from ComfyUI's seed: it depends on the seed and the place in the batch alone, and is the same on
every device. So give the samplers of one workflow different seeds, or their noise is the same. Models of rectified flow
(SD3, Flux, Wan) are recognised by their model_sampling.
"""

import comfy.model_sampling
import comfy.samplers

from ddpm_ext import Philox
from ddpm_ext.integrations.k_diffusion import NAMES, sampler


class DdpmExtSampler:
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "Samplers of ddpm_ext: each step in one launch, and noise that depends on seed and sample alone."

    @classmethod
    def INPUT_TYPES(cls):
        others = ("ddim", "dpmpp_2s")  # with eta they are the ancestral samplers
        names = [name for name in NAMES if name not in others]
        number = {"min": 0.0, "max": 100.0, "step": 0.01, "round": False}
        return {
            "required": {
                "sampler_name": (names, {"default": "dpmpp_2m"}),
                "eta": ("FLOAT", number | {"default": 1.0, "tooltip": "of the ancestral and the SDE samplers"}),
                "s_churn": ("FLOAT", number | {"default": 0.0, "tooltip": "of euler, heun and dpm_2; 0 for flow"}),
                "s_noise": ("FLOAT", number | {"default": 1.0, "tooltip": "a factor of the noise"}),
            }
        }

    def get_sampler(self, sampler_name, eta, s_churn, s_noise):
        function = sampler(sampler_name)
        given = {"eta": eta, "s_churn": s_churn, "s_noise": s_noise}
        options = {name: value for name, value in given.items() if name in function.__signature__.parameters}

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
            seed = (extra_args or {}).get("seed")
            rng = None if seed is None else Philox(seed)
            return function(model, x, sigmas, extra_args, callback, disable, rng=rng, flow=is_flow(model), **options)

        return (comfy.samplers.KSAMPLER(sample),)


def is_flow(model):
    """Whether samples are (1 - sigma) x0 + sigma noise: whether the innermost model's model_sampling is a CONST."""
    while not hasattr(model, "model_sampling") and hasattr(model, "inner_model"):
        model = model.inner_model
    return isinstance(getattr(model, "model_sampling", None), comfy.model_sampling.CONST)


NODE_CLASS_MAPPINGS = {"DdpmExtSampler": DdpmExtSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"DdpmExtSampler": "Sampler (ddpm_ext)"}
