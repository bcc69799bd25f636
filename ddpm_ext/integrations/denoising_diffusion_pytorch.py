"""The mixin for denoising-diffusion-pytorch's GaussianDiffusion: a step in one launch, the training loss in two.

Samples are in [-1, 1], but the library's callers pass training images and get samples in [0, 1]. p_sample_loop and
ddim_sample convert their result by the library's `unnormalize`; interpolate does not, as in the library. The library's
method `forward`, which is not replaced, converts the training images.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ddpm_ext import ops
from ddpm_ext.integrations.denoising_tables import BUFFERS, DTYPES, DenoisingTables
from ddpm_ext.integrations.fallback import Fallback, returning, with_fallback
from ddpm_ext.integrations.loop_options import LoopOptionsTaker, takes_loop_options
from ddpm_ext.integrations.peer_diffusion import start_noise
from ddpm_ext.integrations.row_stepper import take_step
from ddpm_ext.integrations.shared import Support, new, peer_method
from ddpm_ext.integrations.tensors import (
    check_batch,
    check_output,
    check_pair,
    check_tensors,
    dtype_name,
    layout_arguments,
    noise_arguments,
    noise_itself,
    wants_gradient,
)
from ddpm_ext.ops.noise import STREAM_OFFSET, STREAM_START, Philox, randn
from ddpm_ext.ops.result_memory import empty_like
from ddpm_ext.ops.row import ROW
from ddpm_ext.tables.on_device import KernelTables
from ddpm_ext.tables.predictions import peer_predictions

SUPPORT = tuple(
    Support("denoising_diffusion_pytorch", *row)
    for row in (
        (
            "p_sample",
            "float32, and 16 bits where the buffers have them; every objective; self-conditioning; a model's output of "
            "16 bits, except for pred_x0",
            "float64; samples of fewer bits than the buffers; a model's output of another shape",
        ),
        ("p_sample_loop", "as p_sample; return_all_timesteps", "as p_sample"),
        (
            "ddim_sample",
            "as p_sample; sampling_timesteps, ddim_sampling_eta, return_all_timesteps",
            "as p_sample; an eta that is negative, or asks for more noise than there is",
        ),
        (
            "sample",
            "its loop: p_sample_loop or ddim_sample; with options of ddpm_ext's p_sample_loop that loop, and its noise",
            "as p_sample",
        ),
        ("interpolate", "as p_sample; t, lam", "as p_sample; images of two dtypes"),
        ("q_sample", "as p_sample, with gradients; immiscible", "as p_sample; torch.compile; torch.func"),
        (
            "p_losses, forward",
            "as q_sample; every objective and loss_weight; offset noise; loss_reduction; autocast; the library always "
            "draws the timesteps and whether to self-condition; a second derivative is refused",
            "as q_sample; gradients by images or noise",
        ),
        ("all others", "", "all"),
    )
)

OLDEST = (1, 10)  # the oldest version of the library whose objects can be accelerated
PREDICTIONS = peer_predictions("denoising-diffusion-pytorch")
_take_buffers = operator.itemgetter(*BUFFERS)
Step = tuple[Tensor, Tensor | None]  # the next sample, and x_start if the caller needs it


def _library() -> Any:
    """The library's module. Its attributes `tqdm` and `random` are read at each use, since a user may replace them."""
    return importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")


class Denoising(LoopOptionsTaker):
    """The fused methods for the library's GaussianDiffusion, as a mixin.

    An accelerated class derives from this mixin and, after it, from GaussianDiffusion, so these methods come first.
    """

    library = "denoising-diffusion-pytorch"
    replaces = ("p_sample", "p_sample_loop", "ddim_sample", "interpolate", "q_sample", "p_losses")
    relies_on = (
        "model_predictions",
        "p_mean_variance",
        "q_posterior",
        "predict_start_from_noise",
        "predict_noise_from_start",
        "predict_start_from_v",
        "predict_v",
    )
    sample_calls = ("p_sample_loop", "ddim_sample")
    # attributes of the library's objects, which the mixin reads
    objective: str
    self_condition: bool
    num_timesteps: int
    sampling_timesteps: int
    ddim_sampling_eta: float
    offset_noise_strength: float
    device: torch.device
    unnormalize: Callable[[Tensor], Tensor]
    noise_assignment: Callable[[Tensor, Tensor], Tensor]
    _buffers: dict[str, Tensor]

    def _check(self) -> None:
        """Raises TypeError for versions of the library that are older than OLDEST, the oldest that was tried."""
        version = _library().__version__
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise TypeError(f"obj is of denoising-diffusion-pytorch {version}, expected {oldest} or later")

    # ---------------------------------------------------------------------------------------------------------- rows

    def _prediction(self) -> str:
        self._check_methods()
        if self.objective not in PREDICTIONS:
            raise Fallback(f"its objective is {self.objective!r}")
        return PREDICTIONS[self.objective]

    def _fused_tables(self, dtype: torch.dtype, device: torch.device) -> DenoisingTables:
        """The rows of the current buffers, cached. Raises Fallback if samples of this dtype, or on this device, have no
        fused form.
        """
        buffers = _take_buffers(self._buffers)
        tables = self._cached_by_state((self.objective, *buffers), lambda: DenoisingTables(self._prediction(), buffers))
        if dtype not in tables.sample_dtypes:  # the library's code would change the dtype of the samples
            also = f" and its buffers {dtype_name(tables.dtype)}" if dtype in DTYPES else ""
            raise Fallback(f"its samples are {dtype_name(dtype)}{also}")
        if device != tables.device or device.type not in ("cpu", "cuda"):
            raise Fallback(
                f"its samples are on {device} and its buffers on {tables.device}, expected one CPU or CUDA device"
            )
        return tables

    def _returning(self, output: Any, **attributes: Any) -> Any:
        """An object for the library's code to run on after a Fallback, without a second call of the model.

        It has the same state, apart from a model that returns `output`, and these attributes.
        """
        plain = new(self._peer)
        plain.__dict__.update(self.__dict__, model=returning(output), **attributes)
        return plain

    # --------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    @with_fallback(compiles=False)
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> Step:
        check_tensors(x)

        def by_rows() -> Step:
            steps, row = self._fused_tables(x.dtype, x.device).steps, _index(t)
            if not 0 <= row < len(steps):
                raise Fallback
            times = torch.full((len(x),), row, device=x.device)
            rng = self.accelerated.rng_of_step(len(x), -row) if row > 0 else None
            return STEPS["p_sample"](self, steps, row, x, times, x_self_cond, rng, True)

        by_code = functools.partial(peer_method(self, "p_sample"), x, t, x_self_cond)
        return self._step("p_sample", x, lambda: [_index(t)], (x_self_cond is None,), by_rows, by_code)

    # --------------------------------------------------------------------------------------------------------- loops

    def _descend(
        self, method: str, steps: KernelTables, img: Tensor, rng: Philox | None, count: int, **bar: Any
    ) -> Iterator[Tensor]:
        """Yields `img`, then the samples after each row from count - 1 down to 0, with the library's progress bar."""
        yield img
        x_start = None
        # The timesteps of all steps are created at once; the model gets a row of this tensor.
        times = steps.timesteps(img.device)[:count, None].repeat(1, len(img))
        for row in _library().tqdm(range(count)[::-1], **bar):
            self_cond = x_start if self.self_condition else None
            img, x_start = STEPS[method](self, steps, row, img, times[row], self_cond, rng, self.self_condition)
            yield img

    def _loop(self, method: str, steps: KernelTables, shape: Any, count: int, all_steps: bool, **bar: Any) -> Tensor:
        """Runs a loop from noise and returns its images."""
        rng = self.accelerated.whole_loop(shape[0])
        img, desc = start_noise(shape, rng, self.device), "sampling loop time step"
        imgs = self._descend(method, steps, img, rng, count, desc=desc, **bar)
        return self.unnormalize(torch.stack([*imgs], dim=1) if all_steps else deque(imgs, maxlen=1).pop())

    @torch.inference_mode()
    @takes_loop_options
    @with_fallback(compiles=False)
    def p_sample_loop(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        steps, count = self._fused_tables(torch.get_default_dtype(), self.device).steps, self.num_timesteps
        if not 0 < count <= len(steps):
            raise Fallback
        return self._loop("p_sample", steps, shape, count, return_all_timesteps, total=count)

    @torch.inference_mode()
    @takes_loop_options
    @with_fallback(compiles=False)
    def ddim_sample(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        tables = self._fused_tables(torch.get_default_dtype(), self.device)
        steps = tables.ddim(self.num_timesteps, self.sampling_timesteps, self.ddim_sampling_eta)
        return self._loop("ddim_sample", steps, shape, len(steps), return_all_timesteps)

    @torch.inference_mode()
    @with_fallback(compiles=False)
    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        start = self.num_timesteps - 1 if t is None else _index(t)
        check_pair(x1, x2)
        steps = self._fused_tables(x1.dtype, x1.device).steps
        if not 0 <= start < len(steps):
            raise Fallback
        times = torch.full((len(x1),), start, device=x1.device)
        rng = self.accelerated.whole_loop(len(x1))
        noised = []
        for draw, x in enumerate((x1, x2)):
            source = {"noise": torch.randn_like(x)} if rng is None else {"rng": rng.of(STREAM_START, draw)}
            noised.append(self._noised(steps, x, times, source))
        img = (1 - lam) * noised[0] + lam * noised[1]
        desc = "interpolation sample time step"
        return deque(self._descend("p_sample", steps, img, rng, start, desc=desc, total=start), maxlen=1).pop()

    # --------------------------------------------------------------------------------- loops with options of ddpm_ext's

    def _default_options(self, method: str, loop_options: Mapping[str, Any]) -> dict[str, Any]:
        defaults = {"record": "last", "self_condition": self.self_condition, "device": self.device}
        if method == "ddim_sample" and "sampler" not in loop_options:
            defaults |= {"sampler": "ddim", "eta": self.ddim_sampling_eta}
            defaults |= {} if "timesteps" in loop_options else {"steps": self.sampling_timesteps}
        return defaults

    def _finish(self, images: Any) -> Any:
        """Converts the samples, or the list of each step's samples, to [0, 1]."""
        return [self.unnormalize(image) for image in images] if isinstance(images, list) else self.unnormalize(images)

    # ------------------------------------------------------------------------------------------------------ training

    def _steps_of_batch(self, x: Tensor, t: Any, noise: Tensor | None) -> KernelTables:
        """The rows for a training batch. Raises Fallback if there are none."""
        check_batch(x, t, noise)
        return self._fused_tables(x.dtype, x.device).steps

    def _noised(self, steps: KernelTables, x: Tensor, t: Tensor, source: dict[str, Any]) -> Tensor:
        if getattr(self, "immiscible", False):  # older versions don't have this attribute
            noise = noise_itself(source, x)
            source = {"noise": noise[self.noise_assignment(x, noise)]}
        return ops.forward_process(x, steps.get("q_sample", x.device, torch.float32), t, **source)

    @with_fallback(compiles=False)
    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        steps = self._steps_of_batch(x_start, t, noise)
        return self._noised(steps, x_start, t, self._training_noise(x_start, noise))

    @with_fallback(compiles=False)
    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        steps = self._steps_of_batch(x_start, t, noise)
        if wants_gradient(x_start, noise):
            raise Fallback("a gradient by images or noise is asked for")
        if x_start.dim() != 4:
            raise Fallback
        source = self._training_noise(x_start, noise)
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            source = {"noise": self._offset(x_start, source, strength)}

        x = self._noised(steps, x_start, t, source)
        x_self_cond = None
        if self.self_condition and _library().random() < 0.5:
            with torch.no_grad():
                x_self_cond = self._predict_start(steps, x, t)
        output = self.model(x, t, x_self_cond)

        def peers_loss() -> Tensor:
            plain = self._returning(output, self_condition=False, immiscible=False, offset_noise_strength=0.0)
            # Older versions don't have loss_reduction.
            reduction = {} if loss_reduction == "mean" else {"loss_reduction": loss_reduction}
            return plain.p_losses(x_start, t, noise_itself(source, x), **reduction)

        check_output(x, output, peers_loss)
        target = None if self.objective == "pred_noise" else x_start
        rows = steps.get("loss", x.device, torch.float32)
        reduction = "none" if loss_reduction == "none" else "mean"
        loss = ops.diffusion_loss(output, target, rows, t, reduction=reduction, **source)
        if x.dtype != loss.dtype and not torch.is_autocast_enabled(x.device.type):  # the operator's loss is float32
            loss = loss.to(x.dtype)
        return loss

    def _offset(self, x: Tensor, source: dict[str, Any], strength: float) -> Tensor:
        """The noise, plus `strength` times a normal number for each channel of each sample.

        It writes the sum to the caller's noise, as the library does.
        """
        noise = noise_itself(source, x)
        rng = source["rng"] if "rng" in source else self.accelerated.next_forward(x.device)
        sizes = x.shape[:2]
        if rng is None:
            offsets = torch.randn(sizes, device=self.device)
        else:
            offsets = randn(sizes, rng.of(STREAM_OFFSET, rng.draw), device=self.device)
        noise += strength * offsets[:, :, None, None]
        return noise

    @with_fallback("p_losses")
    def _predict_start(self, steps: KernelTables, x: Tensor, t: Tensor) -> Tensor:
        """The predicted clean sample for self-conditioning, which the library clips in sampling but not in training."""
        output = self.model(x, t, None)
        if self.objective == "pred_x0":
            return output.detach()
        check_output(x, output, lambda: self._returning(output).model_predictions(x, t).pred_x_start)
        return ops.predict_start(x, output, steps.get("start", x.device, torch.float32), t)


def _step(
    method: str,
    gd: Denoising,
    steps: KernelTables,
    row: int,
    x: Tensor,
    times: Tensor,
    x_self_cond: Tensor | None,
    rng: Philox | None,
    with_x0: bool,
) -> Step:
    """Takes the step of row `row` in one launch. Row 0 is the last step of a loop, which adds no noise."""
    output = gd.model(x, times, x_self_cond)

    def peers_step() -> Step:
        plain = gd._returning(output)  # noqa: SLF001 (of this module)
        if method == "p_sample":
            return plain.p_sample(x, row, x_self_cond)
        x_start = plain.model_predictions(x, times, clip_x_start=True).pred_x_start
        if row == 0:
            return x_start, x_start
        numbers = dict(zip(ROW, steps.get("steps", torch.device("cpu"), torch.float64)[row].tolist(), strict=False))
        return numbers["c0"] * x_start + numbers["c1"] * x + numbers["s"] * torch.randn_like(x), x_start

    # With the objective pred_x0, the library's x_start has the output's dtype, which must be that of the samples here.
    check_output(x, output, peers_step, allow_16_bits=gd.objective != "pred_x0")
    noise: dict[str, Any] = {}
    if row > 0:
        noise = noise_arguments(torch.randn_like(x), x) if rng is None else {"rng": rng}
    noise |= layout_arguments(output if gd.objective == "pred_x0" else x, x)
    x0 = empty_like(noise.get("out", x)) if with_x0 else None
    return take_step(steps, x, output, row, x0_out=x0, **noise), x0


# {name of the library's method: a function that takes a step of this method}. Fallbacks are recorded under these names.
STEPS: dict[str, Callable[..., Step]] = {
    method: with_fallback(method)(functools.partial(_step, method)) for method in ("p_sample", "ddim_sample")
}


def _index(t: Any) -> int:
    """t as an int; -1 if it is not an integer."""
    try:
        return operator.index(t)
    except TypeError:
        return -1
