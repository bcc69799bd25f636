"""Helpers of the tests that compare accelerated objects of guided-diffusion and improved-diffusion with plain ones."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from unittest import mock

import pytest
import torch
from support.checkouts import missing
from torch.overrides import TorchFunctionMode

LIBRARIES = tuple(name for name in ("guided_diffusion", "improved_diffusion") if importlib.util.find_spec(name))
if not LIBRARIES:
    pytest.skip(missing("guided-diffusion", "improved-diffusion"), allow_module_level=True)

TIMESTEPS, ULP = 1000, 2.0**-23
PREDICTIONS = ("EPSILON", "START_X", "PREVIOUS_X")
VARIANCES = ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE")
OURS = dict(zip(("eps", "x0", "x_prev"), PREDICTIONS, strict=True))  # the libraries' predictions by ddpm_ext's names
LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")
SHAPE = (5, 3, 4, 6)

libraries = pytest.mark.parametrize("library", LIBRARIES)


def module(library, name="gaussian_diffusion"):
    return importlib.import_module(f"{library}.{name}")


def make(
    prediction="EPSILON",
    variance="FIXED_SMALL",
    loss="MSE",
    spacing=None,
    *,
    library=LIBRARIES[0],
    schedule="linear",
    timesteps=TIMESTEPS,
    rescale=False,
    betas=None,
):
    """A GaussianDiffusion of the library, or with `spacing` a SpacedDiffusion.

    The names of the prediction and the variance may be ddpm_ext's. `betas`, a tensor, replaces the schedule's betas.
    """
    peer, respace = module(library), module(library, "respace")
    options = {
        "betas": peer.get_named_beta_schedule(schedule, timesteps) if betas is None else betas.numpy(),
        "model_mean_type": peer.ModelMeanType[OURS.get(prediction, prediction)],
        "model_var_type": peer.ModelVarType[variance.upper()],
        "loss_type": peer.LossType[loss],
        "rescale_timesteps": rescale,
    }
    if spacing is None:
        return peer.GaussianDiffusion(**options)
    return respace.SpacedDiffusion(use_timesteps=respace.space_timesteps(timesteps, spacing), **options)


def learned(variance):
    """Whether a model for this variance returns an output for the variance, too."""
    return not variance.startswith("FIXED")


def model_of(variance, seen=None):
    """A cheap model, with twice the channels of x if it returns a variance. It appends the t of each call to `seen`."""

    def model(x, t, shift=0.0):
        if seen is not None:
            seen.append(t.clone())
        m = x * 0.5 - (t.to(x.dtype) / 2000).reshape(-1, *[1] * (x.dim() - 1)) * x.clamp(-1, 1) + shift
        if not learned(variance):
            return m
        v = (x * 0.7).clamp(-1, 1) - (4 if variance == "LEARNED" else 0)
        return torch.cat([m, v], 1)

    return model


def cond_fn(x, t, shift=0.0):
    return (0.3 - x) * 0.5 + shift + (t.to(x.dtype) / 3000).reshape(-1, *[1] * (x.dim() - 1))


class Noise(TorchFunctionMode):
    """A context in which torch.randn_like returns z, in the dtype of its argument. `drawn` counts its calls."""

    def __init__(self, z):
        super().__init__()
        self.z, self.drawn = z, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.randn_like:
            self.drawn += 1
            return self.z.to(args[0].dtype)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def in_float64(library=LIBRARIES[0]):
    """A context in which the library does not round its float64 tables to float32."""

    def extract(values, t, shape):
        return torch.from_numpy(values).to(t.device)[t].reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    with mock.patch.object(module(library), "_extract_into_tensor", extract):
        yield


def check(ours, theirs, truth, unclipped=None, what=""):
    """Checks ddpm_ext's results against the library's, by their distances from the float64 results `truth`.

    A sample's error is its largest distance, and its size is its largest absolute value. A sample of `ours` may have
    four times the error of the same sample of `theirs`, or the error of their worst sample, or four ulps of its size.
    It may also have one ulp of the size of `unclipped`, the same result of a step without the clip: the clip may have
    made the library's result exact by chance.
    """
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and truth.dtype == torch.float64, what
    assert truth.isfinite().all(), what
    unclipped = truth if unclipped is None else unclipped
    tensors = (ours.double() - truth, theirs.double() - truth, truth, unclipped)
    error, their_error, size, whole = (y.abs().flatten(1).amax(1) for y in tensors)
    allowed = torch.stack([4 * their_error, their_error.max().expand(len(error)), 4 * ULP * size, ULP * whole]).amax(0)
    assert (error <= allowed).all(), f"{what}: {error}, expected at most {allowed}"


def no_fallback(diffusion):
    """Checks that no method of an accelerated object ran the library's code."""
    assert diffusion.accelerated.fallbacks == {}


@functools.cache
def numbers(seed, *shape):
    """Normal numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
