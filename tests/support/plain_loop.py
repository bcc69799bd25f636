"""A sampling loop with every option, in float64 on the CPU: the equation of a step table's rows, and the options.

Tests of the loop compare ddpm_ext's samples with those of this loop. Tests in tests/tables compare the rows themselves
with the papers. Of ddpm_ext, this file uses only the reference noise.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from support.gaussian import calls_model, push, take

from ddpm_ext import Philox, reference


@functools.cache
def noise(shape, ids, draw, stream=0):
    """The drawn noise of samples with these ids, for the seed 1."""
    return reference.randn(shape, Philox(1, torch.tensor(ids)), draw=draw, stream=stream, dtype=torch.float64)


def each(values, x):
    """`values`, of shape (batch,), in the shape (batch, 1, ...) with as many dimensions as x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def rescaled(m, guided, share):
    """Rescaled guidance (Lin et al. 2024, eq. 15 and 16): moves the deviation of `guided` towards that of `m`."""
    ratio = m.flatten(1).std(1) / guided.flatten(1).std(1)
    return share * guided * each(ratio, m) + (1 - share) * guided


def threshold(x0, quantile, maximum):
    """Dynamic thresholding of x0 (Saharia et al. 2022, section 2.3)."""
    bound = np.quantile(np.abs(x0).reshape(len(x0), -1), quantile, axis=1).clip(1, maximum)
    bound = each(bound, x0)
    return np.clip(x0, -bound, bound) / bound


def plain_loop(
    table,
    x,
    model,
    *,
    ids,
    variance=None,
    clip=(-1.0, 1.0),
    quantile=None,
    maximum=np.inf,
    scale=1.0,
    unconditional=None,
    rescale=0.0,
    interval=(0, np.inf),
    cond_fn=None,
    denoised_fn=None,
    known=None,
    mask=None,
    self_condition=False,
):
    """Yields x after each row, and x0 of the last row that called the model.

    variance: what v, the second half of the model's output, is. "log": the factor of a row's noise is exp(l0 + l1 v).
        "direct": v is the variance, and the factor is sqrt(v). None: the model returns no v.
    """
    x0, history = torch.zeros_like(x), []

    def edited(x0):
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        if quantile is not None:
            return threshold(x0, quantile, maximum)
        return x0 if clip is None else np.clip(x0, *clip)

    for row in table:
        t, z = torch.full((len(x),), row.timestep), noise(x.shape, ids, row.draw).numpy()
        m, u, v, g, asked = torch.zeros_like(x), None, None, 0.0, calls_model(row)
        if asked:
            known_x0 = (x0,) if self_condition else ()
            m, *v = model(x, t, *known_x0).split(x.shape[1], 1)
            v = v[0].numpy() if variance else None
            g = 0.0 if cond_fn is None else cond_fn(x, t).numpy()
            if unconditional is not None and interval[0] <= row.timestep <= interval[1]:
                u = unconditional(x, t, *known_x0)[:, : x.shape[1]]
                m, u = rescaled(m, u + scale * (m - u), rescale), u.numpy()
        arrays = x.numpy(), m.numpy()
        own = {"v": v, "v_is_variance": variance == "direct", "clip": edited if asked else clip}
        clean, after = take(row, *arrays, z, u=u, g=g, history=history, **own)
        history = push(row, history, clean, *arrays)
        if known is not None:
            after = mask * (row.signal_after * known + row.noise_after * z) + (1 - mask) * after
        x, x0 = torch.as_tensor(after), torch.as_tensor(clean) if asked else x0
        yield x, x0
