"""Weights between processes: numpy arrays under published names, a version, and a checksum of each.

Arrays cross Ray's object store without a copy; torch tensors would be pickled, three to nine times slower.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from miles.errors import RunError

Weights = dict[str, tuple[str, np.ndarray]]
"""Published name -> (torch dtype, array). Formats that numpy lacks travel as integers of their width."""

_BLOCK_BYTES = 8 * 2048
_CARRIER = {1: torch.uint8, 2: torch.int16}
_NUMPY_KNOWS = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
)


class WeightsDamaged(RunError):
    """What arrived is not what was sent; nothing was loaded."""


@dataclass(frozen=True)
class Manifest:
    """What a packet must hold: its version, and the checksum of every tensor."""

    version: int
    checksums: dict[str, int]


def pack(named: Iterable[tuple[str, torch.Tensor]], version: int) -> tuple[Manifest, Weights]:
    """Arrays (views of the tensors where they are contiguous on the CPU) and their checksums."""
    weights: Weights = {}
    for name, tensor in named:
        carried = tensor.detach().cpu().contiguous()
        if carried.dtype not in _NUMPY_KNOWS:
            carried = carried.view(_CARRIER[carried.element_size()])
        weights[name] = (str(tensor.dtype).removeprefix("torch."), carried.numpy())
    return Manifest(version, {name: _checksum(array) for name, (_, array) in weights.items()}), weights


def verify(manifest: Manifest, weights: Weights) -> None:
    """Raises: WeightsDamaged, naming the first tensor that is missing or altered."""
    for name, expected in manifest.checksums.items():
        if name not in weights:
            raise WeightsDamaged(f"weight version {manifest.version} arrived without {name}")
        if _checksum(weights[name][1]) != expected:
            raise WeightsDamaged(f"weight version {manifest.version} arrived damaged: checksum of {name}")


def unpack(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors over the same memory, for reading only."""
    for name, (dtype, array) in weights.items():
        with warnings.catch_warnings():
            # Arrays of the object store are read-only; whoever loads them copies.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(array)
        yield name, tensor.view(getattr(torch, dtype))


def _checksum(array: np.ndarray) -> int:
    """CRC-32 of the sums of every 2,048 64-bit words, and of the bytes behind the last whole block.

    It runs at the speed of memory; a CRC of every byte takes longer than the transfer that it guards.
    """
    raw = array.reshape(-1).view(np.uint8)
    whole = raw.size // _BLOCK_BYTES * _BLOCK_BYTES
    sums = raw[:whole].view(np.uint64).reshape(-1, _BLOCK_BYTES // 8).sum(axis=1)
    return zlib.crc32(raw[whole:].data, zlib.crc32(sums.view(np.uint8).data))
