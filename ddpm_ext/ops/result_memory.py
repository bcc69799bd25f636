"""The memory of large results on a CPU, which the operators keep when it is freed, for the results that follow.

The C library returns the memory of large blocks to the system when they are freed. A loop such as
x = p_sample(model, x, t) would receive all pages of each result anew, which takes several times as long as the step. So
results of 256 KiB and more come from a pool, which keeps up to eight freed blocks and gives all of them back to the
system as soon as a result has a size that is not among them. The tensors are ordinary ones.

The environment variable DDPM_EXT_RESULT_MEMORY is the bound on what is kept, in MiB: 1024 without it; 0 keeps nothing.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ddpm_ext.ops.extension import C

VARIABLE = "DDPM_EXT_RESULT_MEMORY"


def _limit() -> int:
    """The bound in bytes.

    Raises:
        ValueError: the variable is not a whole number of MiB.
    """
    given = os.environ.get(VARIABLE, "") or "1024"
    if not (given.isascii() and given.isdigit() and int(given) < 2**40):
        raise ValueError(f"{VARIABLE} is {given!r}, expected a whole number of MiB, or 0 to keep nothing")
    return int(given) * 2**20


def empty_like(x: Tensor) -> Tensor:
    """As torch.empty_like, with memory of the pool where x is large and on a CPU."""
    if is_compiling():
        return torch.empty_like(x)
    made: Tensor = C.empty_result_like(x)
    return made


def memory_info() -> dict[str, int]:
    """What the pool of results on the CPU holds, in bytes.

    Returns:
        limit: how much is kept at most; 0 means that results come from torch's allocator. kept: how much is free and
        kept. kept_blocks: the number of blocks in it. used: how much the results take that are alive.

    Examples:
        >>> sorted(memory_info())
        ['kept', 'kept_blocks', 'limit', 'used']
    """
    info: dict[str, int] = C.result_memory()
    return info


def release_memory() -> None:
    """Returns the memory that is kept for results on the CPU to the system. Tensors keep theirs.

    Examples:
        >>> release_memory()
        >>> memory_info()["kept"]
        0
    """
    C.release_result_memory()


C.limit_result_memory(_limit())
