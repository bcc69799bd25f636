"""A pool of memory for large results on a CPU. Operators reuse the memory of freed results for later results.

The C library returns large blocks to the system when they are freed. So a loop such as x = p_sample(model, x, t) would
get new pages for each result, which takes several times as long as the step. Therefore results of 256 KiB and more come
from a pool, which stores up to eight freed blocks. If no stored block has a new result's size, the pool returns all
blocks to the system, so that they don't add to the memory of other sizes. The tensors are ordinary tensors.

The environment variable DDPM_EXT_RESULT_MEMORY limits the pool's free memory, in MiB. Default: 1024; 0: no pool.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ddpm_ext.ops.extension import C

VARIABLE = "DDPM_EXT_RESULT_MEMORY"


def _limit() -> int:
    """The limit of the pool's free memory in bytes, from the environment variable.

    Raises:
        ValueError: the variable is not a whole number of MiB.
    """
    value = os.environ.get(VARIABLE, "") or "1024"
    if not (value.isascii() and value.isdigit() and int(value) < 2**40):
        raise ValueError(f"{VARIABLE} is {value!r}, expected a whole number of MiB, or 0 to keep nothing")
    return int(value) * 2**20


def empty_like(x: Tensor) -> Tensor:
    """Like torch.empty_like, but with memory from the pool for a large tensor on a CPU."""
    if is_compiling():
        return torch.empty_like(x)
    result: Tensor = C.empty_result_like(x)
    return result


def memory_info() -> dict[str, int]:
    """The size of the pool of results on a CPU, in bytes.

    Returns:
        limit: the limit of free memory in the pool. 0 means that results come from torch's allocator.
        kept: the free memory in the pool.
        kept_blocks: the number of free blocks.
        used: the memory of results that are alive.

    Examples:
        >>> sorted(memory_info())
        ['kept', 'kept_blocks', 'limit', 'used']
    """
    info: dict[str, int] = C.result_memory()
    return info


def release_memory() -> None:
    """Returns the free memory of the pool to the system. Results that are alive keep their memory.

    Examples:
        >>> release_memory()
        >>> memory_info()["kept"]
        0
    """
    C.release_result_memory()


C.limit_result_memory(_limit())
