"""How the C library treats memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt(3), with the environment variables that set them, and the greatest values it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
VARIABLES = {
    "MALLOC_MMAP_THRESHOLD_": (M_MMAP_THRESHOLD, 2**25),
    "MALLOC_TRIM_THRESHOLD_": (M_TRIM_THRESHOLD, 2**31 - 1),
}


def keep_freed_memory() -> bool:
    """Tells glibc to keep the memory of freed blocks up to 32 MiB for this process, instead of returning it to the
    system.

    A model's temporary tensors are freed and allocated at every step, and pages that went back to the system are
    received one by one again, which can take longer than the arithmetic. A parameter that the environment sets stays as
    it is.

    Returns:
        Whether the C library took it: False where it is not glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*parameter) == 1 for name, parameter in VARIABLES.items() if name not in os.environ)
