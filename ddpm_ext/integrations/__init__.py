"""Other libraries' diffusion objects, accelerated: the same class and the same results, with one launch a step.

`python -m ddpm_ext.integrations` prints what is fused, class by class. ADDING.md says how to add a class.
"""

from __future__ import annotations

import copy
import importlib
import os
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

from torch import Tensor

from ddpm_ext.integrations.acceleration import AcceleratedObject, Acceleration
from ddpm_ext.integrations.diffusers.pipeline import Pipeline, accelerated_pipeline, is_pipeline
from ddpm_ext.integrations.diffusers.traced_classes import is_scheduler
from ddpm_ext.integrations.registry import accelerated_class, support_table
from ddpm_ext.integrations.shared import Accelerated, Support, accelerated_copy, peer_class
from ddpm_ext.tables.step_table import StepTable

if TYPE_CHECKING:
    from ddpm_ext.integrations.diffusers.tune_pipeline import tune_pipeline as tune_pipeline

__all__ = ["AcceleratedObject", "Acceleration", "Support", "accelerate", "accelerated_class", "support_table"]


def __getattr__(name: str) -> Any:
    """tune_pipeline, whose module needs diffusers, when it is asked for."""
    if name == "tune_pipeline":
        return importlib.import_module("ddpm_ext.integrations.diffusers.tune_pipeline").tune_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _OfDiffusers(Protocol):
    """A pipeline or a scheduler, for type checkers: its own methods stay known, and `accelerated` is Any there."""

    def save_config(self, save_directory: Any, /) -> Any: ...


_D = TypeVar("_D", bound=_OfDiffusers)


@overload
def accelerate(
    obj: _D,
    *,
    table: None = None,
    noise: str = "torch",
    seed: int | None = None,
    sample_ids: int | Tensor = 0,
    trace: bool = False,
) -> _D: ...


@overload
def accelerate(
    obj: Any,
    *,
    table: StepTable | str | os.PathLike[str] | None = None,
    noise: str = "torch",
    seed: int | None = None,
    sample_ids: int | Tensor = 0,
    trace: bool = False,
) -> AcceleratedObject: ...


def accelerate(
    obj: Any,
    *,
    table: StepTable | str | os.PathLike[str] | None = None,
    noise: str = "torch",
    seed: int | None = None,
    sample_ids: int | Tensor = 0,
    trace: bool = False,
) -> AcceleratedObject:
    """An object like `obj` whose steps take one launch each: `pipe = accelerate(pipe)`, as obj itself stays as it was.

    It is of a subclass of obj's class and shares its model and parameters. A call that has no fused form runs the
    library's own code: a warning says why, once for each reason, and `.accelerated.fallbacks` keeps the reason. So does
    a step whose code is not the library's, in obj or in its class. The repr says that the object is accelerated, with
    the fused calls and fallbacks so far.

    Args:
        obj: any scheduler or a pipeline of diffusers, a diffusion of guided-diffusion, improved-diffusion or
            denoising-diffusion-pytorch, or the tutorial's. All schedulers of a pipeline are accelerated, and those of
            the pipelines in it, and those that are put in their places later on; modular pipelines are taken after
            load_components.
        table: a StepTable, or the path of a saved one: of a pipeline, `scheduler` is then a TableScheduler with its
            rows, and so is the result for a scheduler.
        noise: "torch": the library's own draws, by the same generators in the same order, so the images are the same
            as before, to float32 rounding. "philox": noise of the noise contract, which depends on (seed, sample id,
            timestep) alone and is made in the launch. What a pipeline starts from is, too, where it is given neither a
            generator nor latents. Two loops never share noise unless they are given the same seed and ids; Acceleration
            says where a loop begins.
        seed: for "philox", 0 <= seed < 2^64: each loop takes the sample ids after the last loop's, and a new object
            begins anew at sample_ids. None: each loop draws a seed from torch's default CPU generator, so that
            torch.manual_seed makes a run repeatable.
        sample_ids: for "philox", the first sample's id in the first loop; or an int64 tensor of shape (batch,), whose
            ids every loop has: with a seed, the loops' noise is then the same.
        trace: whether steps that somebody wrote himself are replaced, too, once they have been proven. In the first
            loop of each shape, dtype and setting his code runs, and its results are what the loop gets. The rows take
            later loops where both agreed in every step. What is not seen: a global that the step reads and that changes
            later, a branch on the samples' values that the first loop did not take, and what the step does besides,
            such as writing a log.

    Returns:
        The accelerated object. Its `accelerated` holds the settings, of which `rng` and `seed` may be set anew. A copy
        continues where the original stands; from then on, each counts its own loops. sample and p_sample_loop of the
        tutorial's and denoising-diffusion-pytorch's also take the options of GaussianDiffusion.p_sample_loop, such as
        sampler="dpmpp_2m", steps=20, record="last": then that loop runs, with the noise that it draws.

    Raises:
        TypeError: obj is of another kind, or has an attribute in the place of a method that is replaced. Or obj is a
            pipeline without a scheduler, or `table` comes with something else than a pipeline or a scheduler of
            diffusers.
        ValueError: an argument is out of range, or a seed or sample_ids come with noise "torch"; a table that a
            TableScheduler refuses, or whose notes have another prediction than the scheduler.

    Examples:
        >>> scheduler = diffusers.DDIMScheduler()
        >>> scheduler = accelerate(scheduler)  # the same images; where the result is not used, nothing is accelerated
        >>> scheduler = accelerate(diffusers.DDPMScheduler(), noise="philox", seed=0)
    """
    settings = Acceleration.of(noise, seed, sample_ids, trace)
    if table is not None:
        return _of_table(obj, table, settings)
    if is_pipeline(obj):
        return accelerated_pipeline(obj, settings, _accelerated)
    return _accelerated(obj, settings)


def _accelerated(obj: Any, settings: Acceleration) -> Any:
    if isinstance(obj, Accelerated) and peer_class(type(obj)) is type(obj):  # a class of ours
        copied = copy.copy(obj)
        vars(copied)["_acceleration"] = settings
        return copied
    return accelerated_copy(obj, accelerated_class(type(obj)), settings)


Pipeline.accelerate_scheduler = _accelerated


def _of_table(obj: Any, table: Any, settings: Acceleration) -> Any:
    """A pipeline whose `scheduler` has the rows of a table, or a scheduler that has them."""
    own = vars(obj).get("scheduler") if is_pipeline(obj) else obj
    if not is_scheduler(type(own)):
        raise TypeError(f"table is given with a {type(obj).__name__}, expected a pipeline with a scheduler, or one")

    def make(scheduler: Any, of_scheduler: Acceleration) -> Any:
        if scheduler is own:  # the module needs diffusers
            module = importlib.import_module("ddpm_ext.integrations.diffusers.table_scheduler")
            return module.with_table(scheduler, table, of_scheduler)
        return _accelerated(scheduler, of_scheduler)

    if own is obj:
        return make(obj, settings)
    made = accelerated_pipeline(obj, settings, make)
    made.register_modules(scheduler=made.scheduler)  # model_index.json names the class
    return made
