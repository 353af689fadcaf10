"""Names, dtypes and shapes of a safetensors checkpoint, from its headers alone: no weight is read.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, JSON header,
tensor bytes). Sharded checkpoints carry `model.safetensors.index.json` with a `weight_map` of name -> file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from miles.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8,
    "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
"""Bits of a number by its code."""
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header describes it. `dtype` is safetensors' code, e.g. `BF16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    nbytes: int
    offset: int = 0
    """Where its bytes begin in the file."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file. `CheckpointError` when the file is missing, damaged or truncated."""
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path))
    size = path.stat().st_size
    header, data_start = _parse_header(path, size)
    entries = {
        name: _entry(name, raw, path, data_start) for name, raw in header.items() if name != "__metadata__"
    }
    expected = data_start + max(
        (raw["data_offsets"][1] for n, raw in header.items() if n in entries), default=0
    )
    if size != expected:
        cut = ", ".join(_first(n for n in entries if data_start + header[n]["data_offsets"][1] > size))
        raise CheckpointError(
            f"the file is {'truncated' if size < expected else 'longer than its header says'}: "
            f"{size:,} bytes, the header needs {expected:,}" + (f" (incomplete: {cut})" if cut else ""),
            where=str(path),
            fix="copy or download the file again",
        )
    return entries


def read_headers(checkpoint_dir: Path) -> dict[str, TensorEntry]:
    """Tensors of a whole checkpoint directory, single-file or sharded, by published name.

    `CheckpointError` names missing shards, tensors that the index promises and no shard holds, damaged files.
    """
    index_path = checkpoint_dir / INDEX_FILE
    if not index_path.is_file():
        if not (checkpoint_dir / SINGLE_FILE).is_file():
            raise CheckpointError(
                f"no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there",
                where=str(checkpoint_dir),
                fix="point to a Hugging Face checkpoint in safetensors format",
            )
        return read_header(checkpoint_dir / SINGLE_FILE)
    weight_map = _read_index(index_path)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (checkpoint_dir / shard).is_file()]:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing: {', '.join(_first(missing))}",
            where=str(checkpoint_dir),
            fix="copy or download the missing files",
        )
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        entries |= read_header(checkpoint_dir / shard)
    if lost := [name for name, shard in weight_map.items() if _shard_of(entries, name) != shard]:
        raise CheckpointError(
            f"the index names tensors that their shards do not hold: {', '.join(_first(lost))}",
            where=str(index_path),
        )
    return entries


def _parse_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"truncated or not a safetensors file: {size:,} bytes, header of {length:,}", where=str(path)
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"the safetensors header is not JSON: {error}", where=str(path)) from error
    if not isinstance(header, dict):
        raise CheckpointError("the safetensors header is not a JSON object", where=str(path))
    return header, 8 + length


def _entry(name: str, raw: Any, path: Path, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = raw["dtype"], tuple(raw["shape"]), raw["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged header entry for {name}: {error!r}", where=str(path)) from error
    if dtype not in DTYPE_BITS or (prod(shape) * DTYPE_BITS[dtype] + 7) // 8 != end - begin:
        raise CheckpointError(
            f"damaged header entry for {name}: {dtype} {list(shape)} in {end - begin:,} bytes",
            where=str(path),
        )
    return TensorEntry(name, dtype, shape, path, end - begin, data_start + begin)


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"not a safetensors index: {error!r}", where=str(path)) from error
    if not isinstance(weight_map, dict):
        raise CheckpointError("not a safetensors index: weight_map is not an object", where=str(path))
    return weight_map


def _shard_of(entries: Mapping[str, TensorEntry], name: str) -> str | None:
    return entries[name].file.name if name in entries else None


def _first(names: Any, limit: int = 5) -> list[str]:
    listed = list(names)
    return listed[:limit] + ([f"and {len(listed) - limit} more"] if len(listed) > limit else [])
