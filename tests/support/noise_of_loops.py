"""Checks of the noise in loops of accelerated objects of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ddpm_ext import Philox

UNRELATED = 0.12  # a bound for correlations: over 5 standard deviations for independent images of 2000 numbers


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x.flatten().double(), y.flatten().double()]))[0, 1].item()


def unrelated(images: Sequence[Tensor]) -> None:
    """Checks that no two images share noise, by their correlation. An image must have at least 2000 numbers."""
    for x, y in combinations(images, 2):
        assert min(x.numel(), y.numel()) >= 2000
        assert abs(correlation(x, y)) < UNRELATED


def repeats(make: Callable[..., Any], loop: Callable[[Any], Tensor]) -> None:
    """Checks that three loops of one object give different samples, and that the same seed repeats them.

    Checks this with a seed of the object, and with torch's seed.

    make: creates the object from `seed`. With None, torch's seed decides. loop: runs a loop of an object and returns
        its samples, whose only randomness is the object's noise.
    """
    for seed in (None, 7):
        runs = []
        for manual in (1, 1, 2):
            torch.manual_seed(manual)
            obj = make(seed=seed)
            runs.append([loop(obj) for _ in range(3)])
        unrelated(runs[0])
        assert all(torch.equal(x, y) for x, y in zip(runs[0], runs[1], strict=True))
        if seed is None:
            unrelated([*runs[0], *runs[2]])
            torch.manual_seed(1)  # the same object repeats its first loop, too
            assert torch.equal(loop(obj), runs[0][0])
        else:
            assert all(torch.equal(x, y) for x, y in zip(runs[0], runs[2], strict=True))
            obj.accelerated.seed = seed
            assert torch.equal(loop(obj), runs[0][0])


def parts(make: Callable[..., Any], loop: Callable[..., Tensor], batch: int = 10) -> None:
    """Checks that a batch may be divided among several loops, which give the samples of one loop over the whole batch.

    Divides it into two loops of one object. Also checks loops whose sample ids start at 4, by the option `sample_ids`
    and by the object's rng, and a loop whose ids are a tensor, in any order. Checks that all samples of the batch are
    different, and that no loop changes the state of torch's generator.

    make: creates an object with a seed, and with the option `sample_ids` if it is passed. loop: runs a loop of an
        object for a number of samples.
    """
    obj, state = make(), torch.get_rng_state()
    whole = loop(make(), batch)
    assert torch.equal(torch.cat([loop(obj, 4), loop(obj, batch - 4)]), whole)
    assert torch.equal(loop(make(sample_ids=4), batch - 4), whole[4:])
    ids = torch.tensor([5, 0, 3])
    assert torch.equal(loop(make(sample_ids=ids), 3), whole[ids])
    obj.accelerated.rng = Philox(obj.accelerated.seed, 4)
    assert torch.equal(loop(obj, batch - 4), whole[4:])
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.unique(dim=0).shape == whole.shape
