"""Nodes for ComfyUI that give a SAMPLER: ddpm_ext's samplers, or the step table in a file, each step in one launch.

Copy this folder into ComfyUI's custom_nodes, with ddpm_ext installed in its environment. The nodes are under
sampling/custom_sampling/samplers, and their output goes into SamplerCustom or SamplerCustomAdvanced. That of a table
gives its SIGMAS, too, which belong to it.

The noise is made from ComfyUI's seed: it depends on the seed and the place in the batch alone, and is the same on
every device. So give the samplers of one workflow different seeds, or their noise is the same. Models of rectified flow
(SD3, Flux, Wan) are recognised by their model_sampling.
"""

import comfy.model_sampling
import comfy.samplers

from ddpm_ext import Philox, StepTable
from ddpm_ext.integrations.k_diffusion import NAMES, sampler
from ddpm_ext.integrations.table_levels import FLOW, scale_of, table_sigmas


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
            return function(
                model, x, sigmas, extra_args, callback, disable, rng=rng_of(extra_args), flow=is_flow(model), **options
            )

        return (comfy.samplers.KSAMPLER(sample),)


class DdpmExtTable:
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "A step table of ddpm_ext, such as one that was tuned to the model, and the sigmas that belong to it."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {"default": "", "tooltip": "the path of what StepTable.save wrote"})}}

    def get_sampler(self, file):
        table = StepTable.load(file)
        function, of_flow = sampler(table), scale_of(table) == FLOW

        def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
            if is_flow(model) != of_flow:
                raise ValueError(
                    f"{file} is {'' if of_flow else 'not '}for models of rectified flow, and the model is "
                    "of the other kind"
                )
            return function(model, x, sigmas, extra_args, callback, disable, rng=rng_of(extra_args))

        return comfy.samplers.KSAMPLER(sample), table_sigmas(table)[0].float()


def rng_of(extra_args):
    """The noise of ComfyUI's seed."""
    seed = (extra_args or {}).get("seed")
    return None if seed is None else Philox(seed)


def is_flow(model):
    """Whether samples are (1 - sigma) x0 + sigma noise: whether the innermost model's model_sampling is a CONST."""
    while not hasattr(model, "model_sampling") and hasattr(model, "inner_model"):
        model = model.inner_model
    return isinstance(getattr(model, "model_sampling", None), comfy.model_sampling.CONST)


NODE_CLASS_MAPPINGS = {"DdpmExtSampler": DdpmExtSampler, "DdpmExtTable": DdpmExtTable}
NODE_DISPLAY_NAME_MAPPINGS = {"DdpmExtSampler": "Sampler (ddpm_ext)", "DdpmExtTable": "Step table (ddpm_ext)"}
