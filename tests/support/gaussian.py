"""The exact denoiser of Gaussian data, and loops with it, in float64.

The elements of the data are independent, with the distribution N(MU, SIGMA^2). With a = alphas_cumprod, x_t then has
the distribution N(sqrt(a) MU, a SIGMA^2 + 1 - a), and the best prediction of eps, x0 or v is affine in x_t. A step by a
row of a StepTable is affine, too. So the mean and the variance of the sample after each row are known.
"""

import numpy as np
import torch

from ddpm_ext import GaussianDiffusion

MU, SIGMA = 0.4, 0.25
TIMESTEPS = 100


def diffusion(**options):
    return GaussianDiffusion(TIMESTEPS, "linear", **options)


def marginal(alphas_cumprod, sigma=SIGMA):
    """The mean and the variance of x_t at this alphas_cumprod."""
    return alphas_cumprod**0.5 * MU, alphas_cumprod * sigma**2 + 1 - alphas_cumprod


def best_prediction(alphas_cumprod, x, prediction, sigma=SIGMA):
    """The best prediction, E[eps | x_t], E[x0 | x_t] or E[v | x_t], at this alphas_cumprod."""
    root, coroot = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
    mean, variance = marginal(alphas_cumprod, sigma)
    surprise = (x - mean) / variance
    eps, x0 = coroot * surprise, MU + root * sigma**2 * surprise
    return {"eps": eps, "x0": x0, "v": root * eps - coroot * x0}[prediction]


def exact_model(gd):
    """A model that returns the best prediction. For t between timesteps, log(noise / signal) of x_t is linear in t."""
    log_sigma = np.log(1 / gd.alphas_cumprod.numpy() - 1) / 2

    def model(x, t):
        if t.is_floating_point():
            between = np.interp(t.double().cpu().numpy(), np.arange(len(log_sigma)), log_sigma)
            alphas_cumprod = torch.from_numpy(1 / (1 + np.exp(2 * between))).to(x.device)
        else:
            alphas_cumprod = gd.alphas_cumprod.to(x.device)[t]
        alphas_cumprod = alphas_cumprod.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return best_prediction(alphas_cumprod, x, gd.prediction)

    return model


def denoised(signal, noise, x, mean=MU, sigma=SIGMA):
    """E[x0 | x] and E[eps | x] for x = signal x0 + noise eps, where the data have this mean and deviation."""
    surprise = (x - signal * mean) / ((signal * sigma) ** 2 + noise**2)
    return mean + signal * sigma**2 * surprise, noise * surprise


def known_point(row, x, mean):
    """x0 and eps of x at the row's level, if all data are equal to `mean`."""
    return mean, (x - row.signal_now * mean) / row.noise_now


def take(row, x, m, z=0.0, *, u=None, g=0.0, v=None, v_is_variance=False, clip=None, history=()):
    """x0 and the next sample by a StepRow: the equation of StepTable, for floats or float64 arrays.

    m: the guided output. z: the noise. u: the unconditional output; with None, there is no guidance. g: a classifier's
    gradient. v: the model's output for the variance; v_is_variance says whether v is the variance itself. history: H1,
    H2 and H3, or only the first of them in early rows. clip: a range, or a function that clips x0.
    """
    x0 = row.a * x + row.b * m
    if clip is not None:
        x0 = clip(x0) if callable(clip) else np.clip(x0, *clip)
    x0 = x0 + row.g0 * g
    root = 1.0 if v is None else np.sqrt(v) if v_is_variance else np.exp(row.l0 + row.l1 * v)
    mean = row.c0 * x0 + row.c1 * x + row.c2 * m + row.cu * (m if u is None else u)
    mean = mean + sum(weight * tensor for weight, tensor in zip((row.h1, row.h2, row.h3), history, strict=False))
    return x0, mean + root**2 * row.g1 * g + row.s * root * z


def push(row, history, x0, x, m):
    """The history after a row, as a list of at most three tensors, the latest first."""
    if not (row.k0 or row.k1 or row.k2):
        return history
    return [row.k0 * x0 + row.k1 * x + row.k2 * m, *history[:2]]


def calls_model(row):
    """Whether the row reads the model's output. Beside x0, the output's weight without guidance is c2 + cu."""
    return row.b != 0 or row.c2 + row.cu != 0


def loop(table, x, model, noise=None, **options):
    """Yields each row with its x0 and the next sample, computed by `take`.

    model(row, x): returns the output, or a pair of the guided and the unconditional output. It is called only for rows
        that read the output. noise: an iterator over the z of the rows that have noise. With None, z is 0.
    options: more arguments of `take`, for every row.
    """
    history = []
    for row in table:
        m = model(row, x) if calls_model(row) else 0.0 * x
        m, u = m if isinstance(m, tuple) else (m, None)
        z = next(noise) if noise is not None and row.s else 0.0
        x0, after = take(row, x, m, z, u=u, history=history, **options)
        history, x = push(row, history, x0, x, m), after
        yield row, x0, x


def weights(table, signal, noise, model, mean=1.0, sigma=SIGMA):
    """Yields x after each row of a loop, which starts at the level (signal, noise).

    x is linear in the data's mean, in the random part of the first x, and in the noise of each row. It is represented
    as the vector of the weights of these numbers. The random part and the noises are independent standard normals, so
    the sum of their squared weights is the variance of x.

    model(row, x, mean): returns the output for data of this mean, or a pair as for `loop`. x, mean and the output are
        vectors of weights. mean: the mean of the first x is signal * mean times the data's mean. sigma: the data's
        deviation.
    """
    one, deviation, *normals = np.eye(2 + len(table))
    x = signal * mean * one + np.hypot(signal * sigma, noise) * deviation
    for _, _, x in loop(table, x, lambda row, x: model(row, x, one), iter(normals)):
        yield x


def variance_of(x):
    """The variance of a sample, which is a vector of weights (see `weights`)."""
    return (x[1:] ** 2).sum()


def flow(x, start, end):
    """The probability flow's result at the alphas_cumprod `end`, from x at `start`: x keeps its quantile."""
    (mean, variance), (other, narrower) = marginal(start), marginal(end)
    return other + (x - mean) * (narrower / variance) ** 0.5
