"""Derives seeds from one seed and a purpose, so that the random numbers of a step do not depend on earlier steps."""

from __future__ import annotations

import hashlib

import torch


def seed_for(seed: int, purpose: str, index: int = 0) -> int:
    """A number in [0, 2^63): a hash of (seed, purpose, index), which makes equal seeds of two steps very unlikely."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator that starts from `seed_for(seed, purpose, index)`."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, index))
