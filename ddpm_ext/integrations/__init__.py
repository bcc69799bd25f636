"""accelerate() makes a copy of another library's diffusion object whose steps take one kernel launch each.

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
    """Imports tune_pipeline when it is first needed: its module imports diffusers."""
    if name == "tune_pipeline":
        return importlib.import_module("ddpm_ext.integrations.diffusers.tune_pipeline").tune_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _OfDiffusers(Protocol):
    """A pipeline or scheduler of diffusers. For type checkers, accelerate() returns an object of the same type."""

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
    """Returns an accelerated copy of `obj`, whose steps take one launch each: `pipe = accelerate(pipe)`.

    `obj` itself is not changed. The copy is of a subclass of obj's class and shares its model and parameters. A call
    that has no fused form runs the library's code. A step that a user has overridden runs the user's code. A warning
    gives the reason, once for each reason, and `.accelerated.fallbacks` stores it. The repr shows that the object is
    accelerated, with its fused calls and fallbacks so far.

    Args:
        obj: any scheduler or pipeline of diffusers, a diffusion of guided-diffusion, improved-diffusion or
            denoising-diffusion-pytorch, or that of Zhihu's tutorial on DDPM. All schedulers of a pipeline
            and of its inner pipelines are accelerated, and also schedulers that replace them later. A modular pipeline
            must have its components, so call load_components first.
        table: a StepTable, or the path of a saved one. The pipeline's `scheduler` is replaced by a TableScheduler with
            this table. If obj is a scheduler, the result is the TableScheduler.
        noise: "torch" takes the library's draws, from the same generators in the same order, so that the images are the
            same as before, to float32 rounding. "philox" takes noise of the noise contract, which depends only on
            (seed, sample id, timestep). The step's launch draws it. It is also a pipeline's start noise, if the call
            has neither a generator nor latents. Two loops never share noise unless they have the same seed and sample
            ids. Acceleration says where a loop begins.
        seed: for "philox", 0 <= seed < 2^64. Each loop takes the sample ids that follow the previous loop's, and a new
            object begins at sample_ids. With None, each loop draws a seed from torch's default CPU generator, so that
            torch.manual_seed makes a run repeatable.
        sample_ids: for "philox", the first sample's id in the first loop. Or an int64 tensor, (batch,), with the ids of
            every loop: with a seed, all loops have the same noise in this case.
        trace: whether to replace also steps that a user wrote. In the first loop of each shape, dtype and setting the
            user's code runs, and the loop gets its results. If the traced rows agree in every step, they replace the
            user's code in later loops. The rows miss later changes of a global that the step reads, branches on the
            samples' values that the first loop did not take, and side effects such as writing a log.

    Returns:
        The accelerated object. Its attribute `accelerated` has the settings, of which `rng` and `seed` may be set. A
        copy of the object continues the original's loops; afterwards the two count their loops separately. `sample` and
        `p_sample_loop` of the tutorial's class and of denoising-diffusion-pytorch, and `ddim_sample` of the latter,
        also take the options of ddpm_ext's GaussianDiffusion.p_sample_loop, such as sampler="dpmpp_2m", steps=20,
        record="last". With these options, ddpm_ext's loop runs in place of the library's, with the noise of ddpm_ext's
        loop.

    Raises:
        TypeError: an argument has a wrong type; obj can't be accelerated, or has an attribute in place of a method that
            is replaced; obj is a pipeline without a scheduler; `table` is given for an obj that is neither a pipeline
            nor a scheduler of diffusers.
        FileNotFoundError: `table` is the path of no file.
        ValueError: an argument is out of range; seed or sample_ids is given with noise "torch"; a pipeline has more
            schedulers than noise "philox" has streams; TableScheduler rejects the table, or the prediction in its notes
            is not the scheduler's.

    Examples:
        >>> scheduler = diffusers.DDIMScheduler()
        >>> scheduler = accelerate(scheduler)  # use the result: the original scheduler stays as it was
        >>> scheduler = accelerate(diffusers.DDPMScheduler(), noise="philox", seed=0)
    """
    settings = Acceleration.of(noise, seed, sample_ids, trace)
    if table is not None:
        return _of_table(obj, table, settings)
    if is_pipeline(obj):
        return accelerated_pipeline(obj, settings, _accelerated)
    return _accelerated(obj, settings)


def _accelerated(obj: Any, settings: Acceleration) -> Any:
    # A TableScheduler. Its class is accelerated already, and has no original class. A copy with the settings is enough.
    if isinstance(obj, Accelerated) and peer_class(type(obj)) is type(obj):
        accelerated = copy.copy(obj)
        vars(accelerated)["_acceleration"] = settings
        return accelerated
    return accelerated_copy(obj, accelerated_class(type(obj)), settings)


Pipeline.accelerate_scheduler = _accelerated


def _of_table(obj: Any, table: Any, settings: Acceleration) -> Any:
    """An accelerated pipeline whose `scheduler` is a TableScheduler; for a scheduler, the TableScheduler."""
    replaced = vars(obj).get("scheduler") if is_pipeline(obj) else obj
    if not is_scheduler(type(replaced)):
        raise TypeError(f"table is given with a {type(obj).__name__}, expected a pipeline with a scheduler, or one")

    def make(scheduler: Any, scheduler_settings: Acceleration) -> Any:
        if scheduler is replaced:
            # Imported here, because the module imports diffusers.
            module = importlib.import_module("ddpm_ext.integrations.diffusers.table_scheduler")
            return module.with_table(scheduler, table, scheduler_settings)
        return _accelerated(scheduler, scheduler_settings)

    if replaced is obj:
        return make(obj, settings)
    pipeline = accelerated_pipeline(obj, settings, make)
    pipeline.register_modules(scheduler=pipeline.scheduler)  # so that model_index.json names the new class
    return pipeline
