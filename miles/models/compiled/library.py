"""The compiled functions as Python sees them; they mirror the extern "C" parts of the sources.

All tensors are contiguous fp32 (ids int64) on the CPU.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTH_STEP = 32
"""Widths that are multiples of this fill whole panels of vectors on every machine."""


class ExpertSizes(Structure):
    _fields_ = tuple((name, c_int64) for name in ("tokens", "top_k", "experts", "hidden", "width"))


class Heads(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "queries", "keys", "d", "segments")),
        *((name, c_void_p) for name in ("starts", "prompts", "q_norm", "k_norm", "rotation")),
        ("eps", c_float),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "miles_experts": (POINTER(ExpertSizes), *(c_void_p,) * 9),
    "miles_experts_backward": (POINTER(ExpertSizes), *(c_void_p,) * 12),
    "miles_norm": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_void_p),
    "miles_norm_backward": (*(c_void_p,) * 4, c_int64, c_int64, c_void_p, c_void_p),
    "miles_attention": (POINTER(Heads), *(c_void_p,) * 5),
    "miles_attention_backward": (POINTER(Heads), *(c_void_p,) * 9),
    "miles_heads_backward": (POINTER(Heads), *(c_void_p,) * 6),
    "miles_linear": (*(c_void_p,) * 3, *(c_int64,) * 3, c_void_p),
    "miles_swiglu": (c_void_p, c_int64, c_int64, c_void_p),
    "miles_router_scores": (c_void_p, c_int64, c_int64, c_void_p),
    "miles_choose_experts": (c_void_p, *(c_int64,) * 3, c_void_p),
    "miles_weigh_experts": (c_void_p, c_void_p, *(c_int64,) * 4, c_void_p),
    "miles_log_softmax": (c_void_p, c_void_p, c_int64, c_int64, c_void_p),
}


class Library:
    """The loaded functions."""

    experts: Any
    experts_backward: Any
    norm: Any
    norm_backward: Any
    attention: Any
    attention_backward: Any
    heads_backward: Any
    linear: Any
    swiglu: Any
    router_scores: Any
    choose_experts: Any
    weigh_experts: Any
    log_softmax: Any

    def __init__(self, path: Path) -> None:
        self.path = path
        loaded = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = None, arguments
            setattr(self, name.removeprefix("miles_"), function)


def plain(*tensors: Tensor) -> bool:
    """Whether the functions can read these tensors: fp32 on the CPU."""
    return all(x.dtype == torch.float32 and x.is_cpu for x in tensors)


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where the contiguous tensors lie; None for an absent one. The caller keeps them alive."""
    assert all(x is None or x.is_contiguous() for x in tensors), "the kernels read contiguous tensors"
    return [None if x is None else x.data_ptr() for x in tensors]
