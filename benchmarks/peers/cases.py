"""What is measured: a step and a loop of each library, by the library's own object or by the accelerated one.

The models cost nothing, so all of the time is spent in the library, or in ddpm_ext.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STEPS = 20
PIXELS, LATENTS = ((1, 3, 32, 32), (64, 3, 32, 32)), ((1, 4, 64, 64), (64, 4, 64, 64))
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Case:
    """A row of the table.

    library, what: its first two cells. obj: the library's object. prepare(obj, shape): a function that runs `steps`
    steps. shapes: of the samples that it is measured with.
    """

    library: str
    what: str
    obj: Any
    prepare: Callable[[Any, tuple[int, ...]], Callable[[], Any]]
    steps: int = 1
    shapes: tuple[tuple[int, ...], ...] = PIXELS


def cases() -> Iterator[Case]:
    """The rows of the libraries that can be imported."""
    for library, made in (
        ("diffusers", _diffusers),
        ("guided_diffusion", _guided),
        ("improved_diffusion", _guided),
        ("denoising_diffusion_pytorch", _denoising),
    ):
        try:
            importlib.import_module(library)
        except ImportError:
            continue
        yield from made(library)


# ------------------------------------------------------------------------------------------------------- diffusers


def _diffusers(library: str) -> Iterator[Case]:
    import diffusers

    for name, options, more in (
        ("DDPMScheduler", {}, {}),
        ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
        ("DDPMScheduler", {"thresholding": True}, {}),
        ("DDIMScheduler", {}, {}),
        ("DDIMScheduler", {}, {"eta": 1.0}),
        ("DDIMInverseScheduler", {}, {}),
        ("DPMSolverMultistepScheduler", {}, {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
        ("EulerDiscreteScheduler", {}, {}),
        ("EulerAncestralDiscreteScheduler", {}, {}),
    ):
        scheduler = getattr(diffusers, name)(1000, **LINEAR, **options)
        label = ", ".join(
            [
                name.removesuffix("Scheduler"),
                *("thresholding" if v is True else v for v in options.values()),
                *(f"eta {v}" for v in more.values()),
            ]
        )
        if not name.startswith(("Euler", "DPM")):  # which count their steps
            yield Case(library, f"{label}: step", scheduler, _one_step(more))
        yield Case(library, f"{label}: loop", scheduler, scheduler_loop(more), STEPS)
    yield Case(library, "DDPM: add_noise", diffusers.DDPMScheduler(1000, **LINEAR), _add_noise)
    for label, name, options, steps in (
        ("UniPC", "UniPCMultistep", STABLE_DIFFUSION, STEPS),
        ("PNDM", "PNDM", {"skip_prk_steps": True, **STABLE_DIFFUSION}, STEPS + 1),
        ("DPM++ 3M", "DPMSolverMultistep", {"solver_order": 3, **STABLE_DIFFUSION}, STEPS),
        ("LMS", "LMSDiscrete", STABLE_DIFFUSION, STEPS),
        ("FlowMatchEuler", "FlowMatchEulerDiscrete", {"shift": 3.0}, STEPS),
        ("LCM (noise)", "LCM", STABLE_DIFFUSION, STEPS),
        ("SA-Solver (noise)", "SASolver", STABLE_DIFFUSION, STEPS),
    ):
        scheduler = getattr(diffusers, f"{name}Scheduler")(1000, **options)
        yield Case(library, f"{label}: loop", scheduler, scheduler_loop({}), steps, LATENTS)


def _output(scheduler: Any, shape: tuple[int, ...]) -> Tensor:
    channels = 2 * shape[1] if scheduler.config.get("variance_type") == "learned_range" else shape[1]
    return torch.randn(shape[0], channels, *shape[2:]).clamp(-1, 1)


def _one_step(more: dict[str, Any]) -> Callable[[Any, tuple[int, ...]], Callable[[], Any]]:
    def prepare(scheduler: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
        scheduler.set_timesteps(STEPS)
        x, m, t = torch.randn(shape), _output(scheduler, shape), scheduler.timesteps[STEPS // 2]
        return lambda: scheduler.step(m, t, x, return_dict=False, **more)

    return prepare


def scheduler_loop(more: dict[str, Any]) -> Callable[[Any, tuple[int, ...]], Callable[[], Any]]:
    def prepare(scheduler: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
        m, start = _output(scheduler, shape), torch.randn(shape)
        scales = hasattr(scheduler, "scale_model_input")

        def loop() -> None:
            scheduler.set_timesteps(STEPS)
            x = start
            for t in scheduler.timesteps:
                if scales:
                    scheduler.scale_model_input(x, t)
                x = scheduler.step(m, t, x, return_dict=False, **more)[0]

        return loop

    return prepare


def _add_noise(scheduler: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
    x, z, t = torch.randn(shape), torch.randn(shape), torch.arange(shape[0])
    return lambda: scheduler.add_noise(x, z, t)


# ------------------------------------------------------------------------------ guided-diffusion, improved-diffusion


def _guided(library: str) -> Iterator[Case]:
    peer = importlib.import_module(f"{library}.gaussian_diffusion")
    respace = importlib.import_module(f"{library}.respace")
    for variance in ("FIXED_SMALL", "LEARNED_RANGE"):
        spaced = respace.SpacedDiffusion(
            use_timesteps=respace.space_timesteps(1000, [STEPS]),
            betas=peer.get_named_beta_schedule("linear", 1000),
            model_mean_type=peer.ModelMeanType.EPSILON,
            model_var_type=peer.ModelVarType[variance],
            loss_type=peer.LossType.MSE,
        )
        channels = 2 if variance == "LEARNED_RANGE" else 1
        named = variance.lower()
        yield Case(library, f"p_sample, {named}", spaced, _p_sample(channels))
        yield Case(library, f"p_sample_loop, {named}", spaced, _guided_loop("p_sample_loop", channels), STEPS)
        if channels == 1:
            yield Case(library, f"ddim_sample_loop, {named}", spaced, _guided_loop("ddim_sample_loop", channels), STEPS)
        yield Case(library, f"training_losses and backward, {named}", spaced, _guided_training(channels))


def _model(shape: tuple[int, ...], channels: int) -> Callable[..., Tensor]:
    output = torch.randn(shape[0], channels * shape[1], *shape[2:]).clamp(-1, 1)
    return lambda *_, **__: output


def _p_sample(channels: int) -> Callable[[Any, tuple[int, ...]], Callable[[], Any]]:
    def prepare(diffusion: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
        model, x, t = _model(shape, channels), torch.randn(shape), torch.full(shape[:1], STEPS // 2)
        return lambda: diffusion.p_sample(model, x, t)

    return prepare


def _guided_loop(loop: str, channels: int) -> Callable[[Any, tuple[int, ...]], Callable[[], Any]]:
    def prepare(diffusion: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
        model = _model(shape, channels)
        return lambda: getattr(diffusion, loop)(model, shape, device="cpu")

    return prepare


def _guided_training(channels: int) -> Callable[[Any, tuple[int, ...]], Callable[[], Any]]:
    def prepare(diffusion: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
        output = _model(shape, channels)().requires_grad_()
        x, t = (
            torch.rand(shape) * 2 - 1,
            torch.arange(shape[0]) % (STEPS - 1) + 1,
        )  # the library's own code computes t = 0

        def train() -> None:
            output.grad = None
            diffusion.training_losses(lambda *_: output, x, t)["loss"].mean().backward()

        return train

    return prepare


# ------------------------------------------------------------------------------------- denoising-diffusion-pytorch


class Net(torch.nn.Module):
    """A model with the attributes that the library's object reads."""

    channels = out_dim = 3
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        if self.output is None or self.output.shape != x.shape:
            self.output = torch.randn_like(x).clamp(-1, 1).clone().requires_grad_(self.training)
        return self.output


def _denoising(library: str) -> Iterator[Case]:
    peer = importlib.import_module(library)
    # The progress bar is left out: it costs as much as a small step.
    importlib.import_module(f"{library}.{library}").tqdm = lambda steps, **_: steps
    options = {"image_size": 32, "beta_schedule": "cosine", "objective": "pred_noise"}
    whole = peer.GaussianDiffusion(Net(), timesteps=STEPS, **options).eval()
    some = peer.GaussianDiffusion(Net(), timesteps=1000, sampling_timesteps=STEPS, **options).eval()
    yield Case(library, "p_sample", whole, _denoising_step)
    yield Case(library, "p_sample_loop", whole, lambda obj, shape: lambda: obj.p_sample_loop(shape), STEPS)
    yield Case(library, "ddim_sample", some, lambda obj, shape: lambda: obj.ddim_sample(shape), STEPS)
    yield Case(library, "p_losses and backward", peer.GaussianDiffusion(Net(), **options), _denoising_training)


def _denoising_step(diffusion: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
    x = torch.randn(shape)
    return lambda: diffusion.p_sample(x, STEPS // 2)


def _denoising_training(diffusion: Any, shape: tuple[int, ...]) -> Callable[[], Any]:
    x, t = torch.rand(shape) * 2 - 1, torch.arange(shape[0])
    return lambda: diffusion.p_losses(x, t).backward()
