"""keep_freed_memory, which tells the C library not to return freed memory to the system."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt(3), with their numbers in malloc.h
# {environment variable: (the parameter that it sets, the largest value of the parameter)}
VARIABLES = {
    "MALLOC_MMAP_THRESHOLD_": (M_MMAP_THRESHOLD, 2**25),
    "MALLOC_TRIM_THRESHOLD_": (M_TRIM_THRESHOLD, 2**31 - 1),
}


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks of up to 32 MiB in this process, instead of returning them to the system.

    A model's temporary tensors are freed and allocated in every step. If their memory went back to the system, each
    allocation would get new pages one by one, which can take longer than the arithmetic. Parameters that the
    environment sets are not changed.

    Returns:
        Whether the C library accepted the setting; False for other libraries than glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*parameter) == 1 for name, parameter in VARIABLES.items() if name not in os.environ)
