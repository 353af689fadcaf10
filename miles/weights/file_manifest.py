"""Size and CRC-32 of every file of a directory: a step of a run's checkpoints is checked by them."""

from __future__ import annotations

import zlib
from pathlib import Path

STEP_MANIFEST = "manifest.json"

_CHUNK_BYTES = 1 << 22


def file_manifest(directory: Path) -> dict[str, dict[str, int]]:
    """`bytes` and `crc32` by path inside the directory."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): {"bytes": p.stat().st_size, "crc32": crc32_of(p)} for p in files}


def crc32_of(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value
