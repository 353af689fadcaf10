"""Routes on disk and between processes: in the smallest integer type that holds them.

In memory routes are int16, -1 for rows that were not recorded. One byte per id is enough for 256 experts
where every row was recorded, and for 128 where some were not.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

KINDS = ("uint8", "int8", "int16")


def compact(routes: np.ndarray) -> np.ndarray:
    """int16 routes as uint8, int8 or int16 of the same shape and values."""
    low, high = (int(routes.min()), int(routes.max())) if routes.size else (0, 0)
    for kind in KINDS:
        limits = np.iinfo(kind)
        if limits.min <= low and high <= limits.max:
            return routes.astype(kind, copy=False)
    raise AssertionError("int16 holds what is int16")


def expand(routes: np.ndarray) -> np.ndarray:
    """The inverse of `compact`: int16."""
    return routes.astype(np.int16, copy=False)


def to_json(routes: np.ndarray) -> dict[str, Any]:
    """Shape, and base64 of the compact form (little-endian) under the name of its type."""
    stored = compact(routes)
    raw = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<")).tobytes()
    return {"shape": list(routes.shape), stored.dtype.name: base64.b64encode(raw).decode("ascii")}


def from_json(encoded: dict[str, Any]) -> np.ndarray:
    """The inverse of `to_json`: int16."""
    kind = next(kind for kind in KINDS if kind in encoded)
    raw = np.frombuffer(base64.b64decode(encoded[kind]), dtype=np.dtype(kind).newbyteorder("<"))
    return raw.reshape(encoded["shape"]).astype(np.int16)
