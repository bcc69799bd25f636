"""Sets of options for p_sample_loop, which tests of the loop run as cases.

The models compute each output element from one element of each input, by sums, products, quotients and clamps only. So
the bits of a sample do not depend on its batch.
"""

from __future__ import annotations

import torch

from ddpm_ext import DynamicThreshold, GaussianDiffusion, Guidance, Inpaint, Philox
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.samplers import ddim

SHAPE = (4, 2, 3, 5)
IDS = (3, 2**40, 0, 11)
SAMPLERS = ("ddpm", "ddim", "rederived")
TIMESTEPS = (99, 80, 61, 40, 22, 9, 3, 0)


def model(x, t, x0=None, *, y=None):
    """A model, whose output has the shape of x. y: labels of shape (batch,)."""
    m = x * 0.5 - (t.to(x.dtype) / 200).reshape(-1, 1, 1, 1) * x.clamp(-1, 1)
    m = m if x0 is None else m + x0 * 0.25
    return m if y is None else m + y.reshape(-1, 1, 1, 1)


def unconditional(x, t, x0=None):
    return model(x, t) * 0.75 - 0.125


def doubled(x, t, y=None):
    """A model for a batch that has each sample twice: returns the unconditional and then the conditional outputs."""
    x_u, x_m = x.chunk(2)
    t_u, t_m = t.chunk(2)
    return torch.cat([unconditional(x_u, t_u), model(x_m, t_m, y=None if y is None else y.chunk(2)[1])])


def once_or_twice(batch):
    """A model that is `model` for `batch` samples and `doubled` for more. Checks that each sample has a label."""

    def either(x, t, y):
        assert len(y) == len(x)
        return model(x, t, y=y) if len(x) == batch else doubled(x, t, y)

    return either


def cond_fn(x, t, y=None):
    gradient = (0.5 - x) * 0.25 + (t.to(x.dtype) / 400).reshape(-1, 1, 1, 1)
    return gradient if y is None else gradient * y.reshape(-1, 1, 1, 1)


def denoised_fn(x0):
    return x0 * 0.75 + 0.1


def with_variance(name):
    """A model that returns an output for the variance `name`, too."""

    def both(x, t):
        v = {"learned_range": (x * 0.75).clamp(-1, 1), "learned": x * 0.25 - 4.0, "learned_variance": x * x * 0.01}
        return torch.cat([model(x, t), v[name]], 1)

    return both


def given(number, part, device, dtype, shape=SHAPE):
    """Normal numbers of the seed `number`, for this part of the batch."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return x[part].to(dtype).to(device)


def half_known(part, device, dtype, soft=False):
    mask = (given(8, part, "cpu", torch.float64) > 0).to(dtype)
    return (mask * 0.75 if soft else mask).to(device)


PART = slice(None)


def inpaint(*where, soft=False, **jumps):
    return {"inpaint": Inpaint(given(7, *where), half_known(*where, soft=soft), **jumps)}


def labels(*where):
    return given(5, *where, shape=SHAPE[:1])


def twice(y):
    """Labels for a batch that has each sample twice. Those of the first half are NaN, since nothing may use them."""
    return torch.cat([y * float("nan"), y])


def constant(**options):
    return lambda *_: options


# By name: a function (part of the batch, device, dtype) that returns options of p_sample_loop.
CASES = {
    "plain": constant(),
    "no clip": constant(clip_denoised=False),
    "clip range": constant(clip_denoised=(-0.5, 0.25)),
    "x0": constant(x0=True),
    "history": constant(sampler="ipndm"),
    "guidance": constant(guidance=Guidance(2.5, unconditional)),
    "guidance doubled": constant(guidance=2.5, model=doubled),
    "guidance interval": constant(guidance=Guidance(2.5, unconditional, interval=(9, 61))),
    "guidance rescale": constant(guidance=Guidance(3.0, unconditional, rescale=0.7)),
    "cond_fn": constant(cond_fn=cond_fn),
    "denoised_fn": constant(denoised_fn=denoised_fn),
    "threshold": constant(clip_denoised=DynamicThreshold(0.8)),
    "threshold maximum": constant(clip_denoised=DynamicThreshold(0.95, 1.25)),
    "inpaint": inpaint,
    "inpaint soft": lambda *where: inpaint(*where, soft=True),
    "inpaint jumps": lambda *where: inpaint(*where, jump_length=2, jump_n_sample=3),
    "self_condition": constant(self_condition=True),
    "self_condition guidance": constant(self_condition=True, guidance=Guidance(2.5, unconditional)),
    "model_kwargs": lambda *where: {"model_kwargs": {"y": labels(*where)}},
    "model_kwargs doubled": lambda *where: {
        "model": once_or_twice(len(labels(*where))),
        "guidance": Guidance(2.5, interval=(9, 61)),
        "model_kwargs": {"y": twice(labels(*where))},
        "cond_fn": cond_fn,
    },
    "everything": lambda *where: {
        "guidance": Guidance(2.5, unconditional, rescale=0.5, interval=(3, 80)),
        "clip_denoised": DynamicThreshold(0.9),
        "model_kwargs": {},
        **{"cond_fn": cond_fn, "denoised_fn": denoised_fn, "self_condition": True, "x0": True},
        **inpaint(*where, jump_length=3, jump_n_sample=2),
    },
}


def sampler_options(gd, sampler):
    """The options of p_sample_loop for one of SAMPLERS.

    "rederived" is ddim with the eps that follows from the clipped x0. It is a step table, since ddpm_ext has no name
    for it.
    """
    if sampler == "rederived":
        grid = make_grid(gd.alphas_cumprod, list(TIMESTEPS), betas=gd.betas)
        return {"sampler": ddim(grid, prediction=gd.prediction, eta=0.5, keep_eps=False)}
    return {"sampler": sampler, "timesteps": list(TIMESTEPS), "eta": 0.5 if sampler == "ddim" else None}


def ours(gd, case, sampler="ddpm", *, part=PART, device="cpu", dtype=torch.float32, **others):
    """The arguments of p_sample_loop for a case and a sampler. others: options that replace these."""
    options = {"model": model, **CASES[case](part, device, dtype), **others}
    ids = torch.tensor(IDS, device=device)[part]
    return {
        "shape": (len(ids), *SHAPE[1:]),
        **sampler_options(gd, sampler),
        **{"rng": Philox(1, ids), "progress": False, "device": device, "dtype": dtype},
        **options,
    }


def make_diffusion(**options):
    return GaussianDiffusion(100, "linear", **options)
