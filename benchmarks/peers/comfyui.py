"""python -m benchmarks.peers.comfyui CHECKOUT: which of ComfyUI's samplers are traced, for docs/k_diffusion.md.

Of the checkout, comfy/k_diffusion and comfy/extra_samplers/uni_pc.py are run. Other modules have stand-ins.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ddpm_ext.integrations.k_diffusion import GUIDED
from ddpm_ext.tables.trace import TraceResult, follow_function

STEPS = 8
OURS = ("uni_pc", "uni_pc_bh2", *GUIDED)  # that the node takes by rows of our own
# What ComfyUI has by another name: on a GPU, or for flow alone.
VARIANTS = ("_gpu", "_RF")


class Sampling:
    """A model_sampling: samples x0 + sigma eps."""

    def sigma(self, timestep: Tensor) -> Tensor:
        return timestep

    def percent_to_sigma(self, percent: float) -> float:
        return 1 - percent

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
        return latent + sigma * noise


class Const(Sampling):
    """That of rectified flow: samples (1 - sigma) x0 + sigma eps."""

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
        return (1 - sigma) * latent + sigma * noise


def module(name: str, **contents: Any) -> ModuleType:
    made = sys.modules[name] = ModuleType(name)
    vars(made).update(contents)
    return made


def samplers(checkout: Path) -> dict[str, Callable[..., Any]]:
    """ComfyUI's functions by the names in its menus."""

    def with_hook(options: dict[str, Any], hook: Callable[..., Any], **_: Any) -> dict[str, Any]:
        return {**options, "sampler_post_cfg_function": [hook]}

    comfy = module("comfy", __path__=[str(checkout / "comfy")])
    comfy.model_sampling = module("comfy.model_sampling", CONST=Const)  # type: ignore[attr-defined]
    patcher = module("comfy.model_patcher", set_model_options_post_cfg_function=with_hook)
    comfy.model_patcher = patcher  # type: ignore[attr-defined]
    try:
        importlib.import_module("torchsde")
    except ModuleNotFoundError:
        module("torchsde")  # the Brownian tree's, whose noise tracing replaces
    found = vars(importlib.import_module("comfy.k_diffusion.sampling"))
    uni_pc = importlib.import_module("comfy.extra_samplers.uni_pc")
    made = {name.removeprefix("sample_"): each for name, each in found.items() if name.startswith("sample_")}
    made |= {"uni_pc": uni_pc.sample_unipc, "uni_pc_bh2": uni_pc.sample_unipc_bh2}
    made |= {name: of_sigmas(made[name]) for name in ("dpm_fast", "dpm_adaptive")}
    return {name: each for name, each in made.items() if not name.endswith(VARIANTS)}


def of_sigmas(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the least and the greatest sigma above 0, and of the number of steps, as one of sigmas."""

    def sample(model: Any, x: Tensor, sigmas: Tensor, disable: bool | None = None) -> Any:
        options = {"n": len(sigmas) - 1, "sigma_min": sigmas[-2], "sigma_max": sigmas[0], "disable": disable}
        return function(model, x, **{name: options[name] for name in options if name in signature(function).parameters})

    return sample


def trace(function: Callable[..., Any], sampling: Sampling, sigmas: Tensor) -> TraceResult:
    patcher = SimpleNamespace(get_model_object=lambda _: sampling)
    model = SimpleNamespace(model_sampling=sampling)
    return follow_function(
        function, sigmas, {}, SimpleNamespace(inner_model=SimpleNamespace(inner_model=model, model_patcher=patcher))
    )


def row(name: str, function: Callable[..., Any]) -> str:
    sigmas = torch.cat([torch.logspace(1.2, -1.5, STEPS), torch.zeros(1)])
    try:
        found = [trace(function, Sampling(), sigmas), trace(function, Const(), torch.linspace(1, 0, STEPS + 1))]
    except (TypeError, ValueError) as error:
        reason = "rows of our own" if name in OURS else f"no: {error}"
        return f"| `{name}` | {reason} | | |"
    count = len(found[0].columns["timestep"])
    return f"| `{name}` | traced | {max(each.residual for each in found):.0e} | {count} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of ComfyUI")
    lines = [f"| sampler | taken | residual | launches in {STEPS} steps |", "|---|---|---:|---:|"]
    lines += [row(*each) for each in sorted(samplers(parser.parse_args().checkout).items())]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
