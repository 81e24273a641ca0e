"""Where a step's memory comes from on a CPU."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Parameters of glibc's mallopt(3)."""
LARGE = 1 << 20
"""Bytes from which on a tensor is a mapping of its own, where freed memory goes back."""


def keep_freed_memory() -> bool:
    """Ask the C library to keep what a step frees for the next step; False where there is no glibc.

    By default every large tensor is a mapping of its own: given back when it is freed, and filled with zeros by the
    kernel, page by page, when the next one is made (benchmarks/log.md has what that costs).
    """
    return _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 1 << 26})


def return_freed_memory() -> bool:
    """Ask the C library to give large tensors back to the system as soon as they are freed; False as above.

    Where saved tensors leave memory in the middle of a step, what stays between them keeps the holes from being used
    again: memory that is kept would grow to twice what it was (benchmarks/log.md). By default glibc stops giving back
    after the first large tensor; a threshold that is set stays.
    """
    return _set({M_MMAP_MAX: 1 << 16, M_MMAP_THRESHOLD: LARGE, M_TRIM_THRESHOLD: LARGE, M_TOP_PAD: 0})


def _set(values: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(mallopt(name, value) for name, value in values.items())
