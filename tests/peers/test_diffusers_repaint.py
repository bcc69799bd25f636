"""diffusers' RePaintScheduler, step by step in float64, against a loop around a known part by a table of its steps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from ddpm_ext import GaussianDiffusion, Inpaint, Philox, StepTable, reference
from ddpm_ext.tables.grid import make_grid
from ddpm_ext.tables.levels import LEVELS, unit_levels
from ddpm_ext.tables.samplers import ddim

repaint = pytest.importorskip("diffusers.schedulers.scheduling_repaint")

F64 = torch.float64
TIMESTEPS, SHAPE = 40, (2, 3, 4)
RNG = Philox(11)


def their_table(gd, scheduler, eta):
    """The rows of RePaintPipeline's loop, and for each the weights that the draws of its noise have.

    A step goes down from its timestep; where the next timestep is higher, undo_step goes up by the betas that follow
    the last one. That is a step behind the authors' order, which `repaint` has: there a jump begins at the level of its
    timestep, before the step down.
    """
    stride = TIMESTEPS // scheduler.num_inference_steps
    down = ddim(make_grid(gd.alphas_cumprod, torch.arange(TIMESTEPS - stride, -1, -stride)), eta=eta)
    columns = {name: [] for name in ("timestep", "a", "b", "c0", "c1", "c2", "s", *LEVELS)}
    weights = []
    for last, t in pairwise([TIMESTEPS, *scheduler.timesteps.tolist()]):
        if t < last:
            values = down[down.timestep.tolist().index(t)]._asdict()
            weights.append([1.0])
        else:
            betas = gd.betas[last : last + stride].tolist()
            kept = math.prod(1 - beta for beta in betas)
            values = dict.fromkeys(columns, 0.0) | {"timestep": last, "c1": kept**0.5, "s": (1 - kept) ** 0.5}
            after = unit_levels(torch.tensor([columns["signal_after"][-1] ** 2 * kept], dtype=F64))
            values["signal_now"], values["noise_now"] = columns["signal_after"][-1], columns["noise_after"][-1]
            values["signal_after"], values["noise_after"] = (level.item() for level in after)
            later = [math.prod(1 - beta for beta in betas[i + 1 :]) for i in range(stride)]
            weights.append([(beta * rest / (1 - kept)) ** 0.5 for beta, rest in zip(betas, later, strict=True)])
        for name, column in columns.items():
            column.append(values[name])
    made = {name: torch.tensor(column, dtype=F64) for name, column in columns.items() if name != "timestep"}
    timestep = torch.tensor(columns["timestep"])
    return StepTable(timestep=timestep, draw=torch.arange(len(timestep)), **made), weights


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("steps", "length", "passes"), [(40, 10, 3), (10, 3, 2), (10, 10, 1)])
def test_loop(monkeypatch, steps, length, passes, eta):
    """At a jump the known part goes up with the rest there, and is noised anew here, as by the authors. So the model of
    loops with jumps looks at each element alone, and their mask is 0 or 1."""
    gd = GaussianDiffusion(TIMESTEPS, "cosine", backend="reference")
    scheduler = repaint.RePaintScheduler(TIMESTEPS, trained_betas=gd.betas.numpy(), eta=eta)
    scheduler.set_timesteps(steps, jump_length=length, jump_n_sample=passes)
    table, weights = their_table(gd, scheduler, eta)
    x, known = torch.randn(2, *SHAPE, dtype=F64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(SHAPE, dtype=F64, generator=torch.Generator().manual_seed(1))
    if passes > 1:
        mask = mask.round()

    def model(x, t):
        return torch.sin(3 * x) if passes > 1 else torch.sin(3 * x + x.mean((1, 2), keepdim=True))

    options = {"inpaint": Inpaint(known, mask), "rng": RNG, "progress": False, "dtype": F64, "record": "last"}
    found = gd.p_sample_loop(model, SHAPE, sampler=table, noise=x, **options)

    draws = (
        weight * reference.randn(SHAPE, RNG, draw=row, dtype=F64) for row, each in enumerate(weights) for weight in each
    )
    monkeypatch.setattr(repaint, "randn_tensor", lambda *args, **kwargs: next(draws))
    last = TIMESTEPS
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(model(x, t), t, x, known, mask).prev_sample if t < last else scheduler.undo_step(x, last)
        last = t
    assert next(draws, None) is None
    assert (passes > 1) == (len(table) > steps)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
