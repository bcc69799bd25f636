"""What diffusers' pipelines launch and read between two calls of the model: their own code and the scheduler's."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_ext import accelerate

NOT_A_LAUNCH = ("aten::empty", "aten::detach", "aten::lift_fresh", "aten::equal")


class Count(TorchDispatchMode):
    """Counts operators that write more than one number, each a launch on a GPU; and values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.reads = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in ("aten::_local_scalar_dense", "aten::nonzero"):
            self.reads += 1
        elif not function.is_view and not name.startswith(NOT_A_LAUNCH):
            written = [x for x in (result if isinstance(result, tuple | list) else [result, *args])]
            self.launches += any(isinstance(x, torch.Tensor) and x.numel() > 1 for x in written)
        return result


def between_calls(pipeline: Any, arguments: dict[str, Any]) -> tuple[float, float]:
    """Launches and reads from a call of the model to the next, the median of a loop's that ran once before."""
    model, counts, seen = pipeline.components.get("unet") or pipeline.transformer, Count(), []
    hooks = [
        model.register_forward_pre_hook(lambda *_: seen.append((counts.launches, counts.reads))),
        model.register_forward_hook(lambda *_: seen.append((counts.launches, counts.reads))),
    ]
    try:
        for _ in range(2):
            seen.clear()
            with counts:
                pipeline(**arguments, generator=torch.Generator().manual_seed(0))
    finally:
        for hook in hooks:
            hook.remove()
    steps = [
        (after[0] - before[0], after[1] - before[1]) for before, after in zip(seen[1::2], seen[2::2], strict=False)
    ]
    return statistics.median(launches for launches, _ in steps), statistics.median(reads for _, reads in steps)


def pipelines() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Small pipelines of random weights, those of the tests: what each is called, it, and its call's arguments."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
    from support.accelerated_diffusers import make
    from support.diffusers_families import FAMILIES, quiet

    def of(name: str, **changed: Any) -> tuple[Any, dict[str, Any]]:
        made, arguments, _ = FAMILIES[name]
        return quiet(made()), arguments | changed

    yield "SD, PNDM", *of("stable_diffusion")
    for name, config in (("DDIM", {}), ("EulerDiscrete", {}), ("DPMSolverMultistep", {})):
        pipeline, arguments = of("stable_diffusion")
        pipeline.scheduler = make(name, beta_schedule="scaled_linear", steps_offset=1, **config)
        yield f"SD, {name}", pipeline, arguments
    yield "SDXL, Euler", *of("stable_diffusion_xl")
    yield "SDXL, Euler, without guidance", *of("stable_diffusion_xl", guidance_scale=1.0)
    yield "SD3, FlowMatchEuler", *of("stable_diffusion_3")
    yield "Flux, FlowMatchEuler", *of("flux")
    yield "SVD, Euler", *of("stable_video_diffusion")
    yield "SVD, Euler, without guidance", *of("stable_video_diffusion", max_guidance_scale=1.0)
    yield "CogVideoX, DDIM", *of("cogvideox")
    yield "CogVideoX, DPM", *of("cogvideox_dpm")
    yield "LCM", *of("latent_consistency")


def table() -> Iterator[str]:
    """The lines of a table of all."""
    yield from ("", "## Pipelines", "")
    yield "Launches and reads from one call of the model to the next, by the pipeline's own code and the scheduler;"
    yield "small models of random weights on a CPU, where a read of what a GPU's host has itself counts, too."
    yield ""
    yield "| pipeline | launches, plain | accelerated | reads, plain | accelerated |"
    yield "|---|---:|---:|---:|---:|"
    for name, pipeline, arguments in pipelines():
        plain, ours = (between_calls(each, arguments) for each in (pipeline, accelerate(pipeline)))
        yield f"| {name} | {plain[0]:g} | {ours[0]:g} | {plain[1]:g} | {ours[1]:g} |"
