"""Other libraries' diffusion objects, accelerated: the same class and the same results, with one launch a step.

`python -m ddpm_ext.integrations` prints what is fused, class by class. ADDING.md says how to add a class.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from ddpm_ext.integrations.acceleration import Acceleration
from ddpm_ext.integrations.diffusers.pipeline import accelerated_pipeline, is_pipeline
from ddpm_ext.integrations.registry import accelerated_class, support_table
from ddpm_ext.integrations.shared import Support, accelerated_copy

__all__ = ["Acceleration", "Support", "accelerate", "accelerated_class", "support_table"]

T = TypeVar("T")


def accelerate(obj: T, *, noise: str = "torch", seed: int | None = None, sample_ids: int | Tensor = 0) -> T:
    """An object like `obj` whose steps take one launch each.

    It is of a subclass of obj's class and shares its model and parameters; obj itself stays as it was. A call that has
    no fused form runs the library's own code: a warning says why, once for each reason, and `.accelerated.fallbacks`
    keeps the reason.

    Args:
        obj: any scheduler or a pipeline of diffusers, a diffusion of guided-diffusion, improved-diffusion or
            denoising-diffusion-pytorch, or the tutorial's. All schedulers of a pipeline are accelerated, and those of
            the pipelines in it; modular pipelines are taken after load_components.
        noise: "torch": the library's own draws, by the same generators in the same order, so the images are the same
            as before, to float32 rounding. "philox": noise of the noise contract, which depends on (seed, sample id,
            timestep) alone and is made in the launch. Two loops never share noise unless they are given the same seed
            and ids; Acceleration says where a loop begins.
        seed: for "philox", 0 <= seed < 2^64: each loop takes the sample ids after the last loop's, and a new object
            begins anew at sample_ids. None: each loop draws a seed from torch's default CPU generator, so that
            torch.manual_seed makes a run repeatable.
        sample_ids: for "philox", the first sample's id in the first loop; or an int64 tensor of shape (batch,), whose
            ids every loop has: with a seed, the loops' noise is then the same.

    Returns:
        The accelerated object. Its `accelerated` holds the settings, of which `rng` and `seed` may be set anew. A copy
        continues where the original stands; from then on, each counts its own loops.

    Raises:
        TypeError: obj is of another kind, or of a subclass that overrides what is replaced. No scheduler of diffusers
            is: one that overrides it is traced. Or it is a pipeline without a scheduler.
        ValueError: an argument is out of range, or a seed or sample_ids come with noise "torch".

    Examples:
        >>> scheduler = accelerate(diffusers.DDIMScheduler())  # the same class, the same images
        >>> scheduler = accelerate(diffusers.DDPMScheduler(), noise="philox", seed=0)
    """
    settings = Acceleration.of(noise, seed, sample_ids)
    if is_pipeline(obj):
        return accelerated_pipeline(obj, settings, _accelerated)
    return _accelerated(obj, settings)


def _accelerated(obj: Any, settings: Acceleration) -> Any:
    return accelerated_copy(obj, accelerated_class(type(obj)), settings)
