"""A denoiser whose exact answer is known.

Each element of the data is N(MU, SIGMA^2), independent of the others. With a = alphas_cumprod, x_t is then
N(sqrt(a) MU, a SIGMA^2 + 1 - a), and the best prediction of eps, x0 or v is affine in x_t. A step by a row of a
StepTable is affine too, so the mean and the variance of each x that a loop reaches are known in float64.
"""

import numpy as np
import torch

from ddpm_ext import GaussianDiffusion

MU, SIGMA = 0.4, 0.25
TIMESTEPS = 100


def diffusion(**options):
    return GaussianDiffusion(TIMESTEPS, "linear", **options)


def marginal(kept, sigma=SIGMA):
    """Mean and variance of x_t."""
    return kept**0.5 * MU, kept * sigma**2 + 1 - kept


def best_prediction(kept, x, prediction, sigma=SIGMA):
    """E[eps | x_t], E[x0 | x_t] or E[v | x_t]."""
    root, coroot = kept**0.5, (1 - kept) ** 0.5
    mean, variance = marginal(kept, sigma)
    surprise = (x - mean) / variance
    eps, x0 = coroot * surprise, MU + root * sigma**2 * surprise
    return {"eps": eps, "x0": x0, "v": root * eps - coroot * x0}[prediction]


def exact_model(gd):
    """Between the timesteps, log sigma is linear in the timestep."""
    log_sigma = np.log(1 / gd.alphas_cumprod.numpy() - 1) / 2

    def model(x, t):
        if t.is_floating_point():
            between = np.interp(t.double().cpu().numpy(), np.arange(len(log_sigma)), log_sigma)
            kept = torch.from_numpy(1 / (1 + np.exp(2 * between))).to(x.device)
        else:
            kept = gd.alphas_cumprod.to(x.device)[t]
        kept = kept.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return best_prediction(kept, x, gd.prediction)

    return model


def take(row, x, m, z=0.0, *, g=0.0, v=None, v_is_variance=False, clip=None, history=()):
    """x0 and the next sample by a StepRow without guidance, for floats or float64 arrays. `history`: H1, H2 and H3, as
    many as there are."""
    x0 = row.a * x + row.b * m
    if clip is not None:
        x0 = np.clip(x0, *clip)
    x0 = x0 + row.g0 * g
    root = 1.0 if v is None else np.sqrt(v) if v_is_variance else np.exp(row.l0 + row.l1 * v)
    mean = row.c0 * x0 + row.c1 * x + (row.c2 + row.cu) * m
    mean = mean + sum(weight * kept for weight, kept in zip((row.h1, row.h2, row.h3), history, strict=False))
    return x0, mean + root**2 * row.g1 * g + row.s * root * z


def push(row, history, x0, x, m):
    """The history after a row: at most three tensors, the latest first."""
    if not (row.k0 or row.k1 or row.k2):
        return history
    return [row.k0 * x0 + row.k1 * x + row.k2 * m, *history[:2]]


def calls_model(row):
    return row.b != 0 or row.c2 + row.cu != 0


def loop(table, x, model, noise=None, **options):
    """Each row with its x0 and the next sample, by `take`. model(row, x) gives the output, of rows that call a model.

    noise: an iterator of the z of rows that have one; None: zeros. options: take's, of every row.
    """
    history = []
    for row in table:
        m = model(row, x) if calls_model(row) else 0.0 * x
        z = next(noise) if noise is not None and row.s else 0.0
        x0, after = take(row, x, m, z, history=history, **options)
        history, x = push(row, history, x0, x, m), after
        yield row, x0, x


def moments(table, levels, mean, variance, model=None):
    """Mean and variance of x after each row of the table, in a loop that starts from N(mean, variance).

    `levels` has alphas_cumprod by timestep; between these, the row's own level counts. model: as loop's, in place of
    the best prediction, affine in x. A row that does not use the model's output gets none.
    """

    def best(row, x):
        return best_prediction(levels.get(row.timestep, row.signal_now**2), x, "eps")

    size = 4  # x, and three tensors of history
    state, covariance = np.array([mean, 0.0, 0.0, 0.0]), np.diag([variance, 0.0, 0.0, 0.0])
    for row in table:

        def step(before, row=row):
            x, *history = before
            m = (model or best)(row, x) if calls_model(row) else 0.0
            x0, after = take(row, x, m, history=history)
            return np.array([after, *push(row, history, x0, x, m)])

        constant = step(np.zeros(size))
        slopes = np.stack([step(one) - constant for one in np.eye(size)], axis=1)
        state = slopes @ state + constant
        covariance = slopes @ covariance @ slopes.T
        covariance[0, 0] += row.s**2
        yield state[0], covariance[0, 0]


def flow(x, start, end):
    """Where the probability flow takes x from alphas_cumprod `start` to `end`. x stays at the same quantile."""
    (mean, variance), (other, narrower) = marginal(start), marginal(end)
    return other + (x - mean) * (narrower / variance) ** 0.5
