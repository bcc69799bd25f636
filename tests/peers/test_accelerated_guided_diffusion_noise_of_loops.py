"""Accelerated guided-diffusion and improved-diffusion objects with noise="philox": no two loops share noise."""

import pytest
import torch
from support.accelerated_guided import LIBRARIES, libraries, make
from support.noise_of_loops import repeats, unrelated

from ddpm_ext import Philox, accelerate

SHAPE = (10, 1, 16, 16)
METHODS = ("p_sample_loop", "ddim_sample_loop")
loops = pytest.mark.parametrize("method", [*METHODS, "by_hand"])


def pointwise(x, t, **_):
    return x * 0.3 + 0.001 * t.reshape(-1, 1, 1, 1)


def made(library, spacing, **options):
    return accelerate(make(library=library, spacing=spacing, timesteps=50), noise="philox", **options)


def steps(diffusion, x, method="p_sample", start=0):
    for t in reversed(range(diffusion.num_timesteps - start)):
        x = getattr(diffusion, method)(pointwise, x, torch.full((len(x),), t))["sample"]
    return x


def sampled(diffusion, method, batch=SHAPE[0], noise=None):
    if method == "by_hand":
        return steps(diffusion, torch.zeros(batch, *SHAPE[1:]))
    eta = {"eta": 1.0} if method == "ddim_sample_loop" else {}
    return getattr(diffusion, method)(pointwise, (batch, *SHAPE[1:]), noise=noise, device="cpu", **eta)


@libraries
@loops
def test_loops_share_no_noise(library, method):
    spacing = None if library == LIBRARIES[0] else "ddim25"
    repeats(lambda seed: made(library, spacing, seed=seed), lambda diffusion: sampled(diffusion, method))


@libraries
@loops
def test_parts_of_a_batch(library, method):
    parts = made(library, "ddim25", seed=9)
    whole = sampled(made(library, "ddim25", seed=9), method)
    assert torch.equal(torch.cat([sampled(parts, method, 4), sampled(parts, method, 6)]), whole)
    assert torch.equal(sampled(made(library, "ddim25", seed=9, sample_ids=4), method, 6), whole[4:])
    parts.accelerated.rng = Philox(9, 4)
    assert torch.equal(sampled(parts, method, 6), whole[4:])


@libraries
def test_loops_that_are_taken_in_turn(library):
    """Each progressive loop has its own noise, whichever is taken further."""
    alone, both = (made(library, "ddim25", seed=9) for _ in range(2))
    expected = [sampled(alone, "p_sample_loop") for _ in range(2)]
    turns = zip(*[both.p_sample_loop_progressive(pointwise, SHAPE, device="cpu") for _ in range(2)], strict=True)
    with torch.no_grad():  # the loops, as the library's own, yield within it
        *_, last = turns
    found = [out["sample"] for out in last]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@libraries
def test_loops_of_all_kinds_in_turn(library):
    diffusion, x = made(library, "ddim25", seed=9), torch.zeros(SHAPE)
    found = []
    for _ in range(2):
        found += [sampled(diffusion, method) for method in (*METHODS, "by_hand")]
        found.append(steps(diffusion, x, start=10))
        found.append(diffusion.p_sample(pointwise, x, torch.full((len(x),), 5))["sample"])
        found.append(diffusion.q_sample(x, torch.full((len(x),), 24)))
        found.append(sampled(diffusion, "ddim_sample_loop", noise=torch.ones(SHAPE)))
    unrelated(found)
