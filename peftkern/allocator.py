"""The C library's allocator, which by default keeps most of the memory that it is given back."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc

THRESHOLD_BYTES = 1 << 20


def return_freed_memory(threshold_bytes: int = THRESHOLD_BYTES) -> bool:
    """Let glibc return freed memory to the system from here on: a lower peak for some time in page faults.

    It sets what the environment variables ``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_`` set, for the whole
    process, and without it thresholds grow up to 32 MB by themselves. It concerns memory of the CPU alone.

    Args:
        threshold_bytes: buffers from this size on are the system's own, and go back when they are freed.

    Returns:
        Whether the allocator has taken it; False where it is not glibc's.

    Raises:
        ValueError: ``threshold_bytes`` is not positive.
    """
    if threshold_bytes <= 0:
        raise ValueError(f"return_freed_memory: threshold_bytes must be positive, got {threshold_bytes}")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return all(mallopt(option, threshold_bytes) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
