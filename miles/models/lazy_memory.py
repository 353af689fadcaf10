"""Host memory that takes real pages only where it is written, and can give them back while in use."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

ON_LINUX = sys.platform == "linux"


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Zeros. On the CPU their memory is taken page by page when it is first written; elsewhere at once."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Private: what is given back of a shared mapping stays in memory.
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if ON_LINUX:
        # A huge page would be taken whole for one byte.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def give_back(part: Tensor) -> None:
    """Return the whole pages inside a contiguous part of `lazy_zeros`; it may read as zeros or as before.

    Does nothing where the system cannot take single pages back: on a GPU, and on others than Linux.
    """
    assert part.is_contiguous()
    if not ON_LINUX or part.device.type != "cpu":
        return
    first = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (part.data_ptr() + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        failed = _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
        assert failed == 0, "the pages are those of a private mapping"


@cache
def _madvise() -> ctypes._NamedFuncPointer:
    return ctypes.CDLL(None).madvise
