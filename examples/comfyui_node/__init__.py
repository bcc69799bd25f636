"""Nodes for ComfyUI that give a SAMPLER, each row of which is one launch: by a name, of another SAMPLER, or of a table.

Copy this folder into ComfyUI's custom_nodes, with ddpm_ext installed in its environment. The nodes are under
sampling/custom_sampling/samplers, and their output goes into SamplerCustom or SamplerCustomAdvanced, with any SIGMAS.
That of a table gives its own SIGMAS, which belong to it. docs/k_diffusion.md says which of ComfyUI's samplers are
taken.

The noise is made from ComfyUI's seed: it depends on the seed and the place in the batch alone, and is the same on
every device. So give the samplers of one workflow different seeds, or their noise is the same. Models of rectified flow
(SD3, Flux, Wan) are recognised by their model_sampling.
"""

import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers

from ddpm_ext import Philox, StepTable
from ddpm_ext.integrations.k_diffusion import GUIDED, NAMES, sampler
from ddpm_ext.integrations.table_levels import FLOW, scale_of, table_sigmas

# ComfyUI's functions that don't trace, and have a name of ours; and those that take a flow's samples as all others.
OURS = {f"sample_{name}": name for name in GUIDED} | {"sample_unipc": "uni_pc_bh1", "sample_unipc_bh2": "uni_pc_bh2"}
NOT_FLOW = ("dpmpp_2m_cfg_pp", "uni_pc_bh1", "uni_pc_bh2")


class DdpmExtSampler:
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "Samplers of ddpm_ext: each step in one launch, and noise that depends on seed and sample alone."

    @classmethod
    def INPUT_TYPES(cls):
        others = ("ddim", "dpmpp_2s")  # with eta they are the ancestral samplers
        names = [name for name in (*NAMES, *GUIDED) if name not in others]
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
        given = {"eta": eta, "s_churn": s_churn, "s_noise": s_noise}
        return (comfy.samplers.KSAMPLER(named(sampler_name, given)),)


class DdpmExtTraced:
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "Another SAMPLER with the same options and other noise: its steps are traced, and each is one launch."

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"sampler": ("SAMPLER", {"tooltip": "such as KSamplerSelect gives"})}}

    def get_sampler(self, sampler):
        function, options = sampler.sampler_function, sampler.extra_options
        ours = OURS.get(function.__name__)
        made = traced(function, options) if ours is None else named(ours, options, ours not in NOT_FLOW)
        return (comfy.samplers.KSAMPLER(made, inpaint_options=sampler.inpaint_options),)


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


def named(name, given, asks=True):
    """The function of a sampler of ours, which takes those of the given options that it has. asks: whether a model of
    rectified flow is one."""
    function = sampler(name)
    options = {key: value for key, value in given.items() if key in function.__signature__.parameters}

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        more = {"rng": rng_of(extra_args), "flow": asks and is_flow(model)}
        if name in GUIDED:
            extra_args, more["unconditional"] = with_unconditional(extra_args)
        return function(model, x, sigmas, extra_args, callback, disable, **more, **options)

    return sample


def traced(function, options):
    accelerated = sampler(function)

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return accelerated(model, x, sigmas, extra_args, callback, disable, rng=rng_of(extra_args), **options)

    return sample


def with_unconditional(extra_args):
    """Arguments with which ComfyUI also computes the unconditional output, and a function that returns the last one."""
    last = []

    def keep(args):
        last[:] = [args["uncond_denoised"]]
        return args["denoised"]

    options = dict((extra_args or {}).get("model_options", {}))
    options = comfy.model_patcher.set_model_options_post_cfg_function(options, keep, disable_cfg1_optimization=True)
    return {**(extra_args or {}), "model_options": options}, lambda: last[0]


def rng_of(extra_args):
    """The noise of ComfyUI's seed."""
    seed = (extra_args or {}).get("seed")
    return None if seed is None else Philox(seed)


def is_flow(model):
    """Whether samples are (1 - sigma) x0 + sigma noise: whether the innermost model's model_sampling is a CONST."""
    while not hasattr(model, "model_sampling") and hasattr(model, "inner_model"):
        model = model.inner_model
    return isinstance(getattr(model, "model_sampling", None), comfy.model_sampling.CONST)


NODE_CLASS_MAPPINGS = {
    "DdpmExtSampler": DdpmExtSampler,
    "DdpmExtTraced": DdpmExtTraced,
    "DdpmExtTable": DdpmExtTable,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DdpmExtSampler": "Sampler (ddpm_ext)",
    "DdpmExtTraced": "Accelerate a sampler (ddpm_ext)",
    "DdpmExtTable": "Step table (ddpm_ext)",
}
