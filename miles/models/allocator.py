"""The C allocator, told to keep what the process frees.

By default glibc gives freed tensors of some MiB back to the kernel and takes them again, page by page, in the
next operation: for activations that costs more than the arithmetic.
"""

from __future__ import annotations

import ctypes

# Parameter numbers of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

_LARGEST_KEPT = 64 << 20
"""Bytes; larger tensors still go back at once, so that a big model's memory is not held twice."""
_KEPT = 1 << 30
_GROWTH = 64 << 20


def keep_freed_memory() -> bool:
    """Let this process reuse freed tensors of up to 64 MiB, holding at most 1 GiB in reserve.

    Returns False, and changes nothing, where the C library has no mallopt (macOS, musl).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _KEPT), (_M_TOP_PAD, _GROWTH))
    accepted = [mallopt(name, value) == 1 for name, value in settings]
    return all(accepted)
