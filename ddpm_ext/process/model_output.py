"""Converts a model's output to the tensors that the operators take."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def unwrap(model_output: Any) -> Tensor:
    """A model's output as a tensor: the output itself, or its attribute `sample`, as of diffusers' models."""
    if isinstance(model_output, Tensor):
        return model_output
    sample = getattr(model_output, "sample", None)
    if not isinstance(sample, Tensor):
        raise TypeError(f"the model's output is a {type(model_output).__name__}, expected a tensor or one as .sample")
    return sample


def split_variance(x_t: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction and the learned variance: views of the halves of a model's output (batch, 2 * channels, ...)."""
    channels = x_t.shape[1] if x_t.dim() > 1 else 0
    if channels == 0:
        raise ValueError(
            f"x_t has shape {tuple(x_t.shape)}, expected (batch, channels, ...) where the variance is learned"
        )
    expected = (x_t.shape[0], 2 * channels, *x_t.shape[2:])
    if model_output.shape != expected:
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)}, expected {expected}, twice x_t's channels, where "
            "the variance is learned"
        )
    prediction, variance = model_output.chunk(2, 1)  # one call of torch; two slices would take two
    return prediction, variance


def split_batch(x_t: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """The conditional and the unconditional output of a model that got the batch twice, as views.

    model_output is (2 * batch, ...): the first half is the unconditional output, the second half the conditional.
    """
    batch, returned = x_t.shape[0], model_output.shape[0]
    if returned != 2 * batch:
        raise ValueError(
            f"the model's output has {returned} samples, expected {2 * batch}: guidance without a function "
            "for the unconditional output gives it the batch twice"
        )
    unconditional, conditional = model_output.chunk(2)
    return conditional, unconditional
