"""The outline of a large event file from a few pieces of it, in time that does not depend on its size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from miles.record import events as kinds
from miles.record.encoding import decode_line

_BLOCK = 1 << 16
ENVELOPE = frozenset({"kind", "writer", "attempt", "seq", "time"})
"""The fields of every record."""
_PHASES = frozenset({kinds.PHASE_START, kinds.PHASE_END})


def skim_file(path: Path, blocks: int, block_bytes: int) -> Iterator[dict[str, Any]]:
    """Records of `blocks` pieces spread evenly over the file, then of its end, in the order written.

    Phases are told only of the end: a start without its end would look like a phase that never ended.
    """
    size = end_of_last_line(path)
    tail_start = max(0, size - 16 * block_bytes)
    with path.open("rb") as file:
        for start in sorted({tail_start * i // blocks for i in range(blocks)} if tail_start else ()):
            records = _records(file, start, min(start + block_bytes, tail_start))
            yield from (r for r in records if r["kind"] not in _PHASES)
        yield from _records(file, tail_start, size)


def end_of_last_line(path: Path) -> int:
    """Offset just after the last newline: what follows is still being written."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end > 0:
            begin = max(0, end - _BLOCK)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1
            end = begin
    return 0


def _records(file: BinaryIO, start: int, end: int) -> Iterator[dict[str, Any]]:
    """Records of the whole lines between two offsets; the rest of a line cut at `start` is no record."""
    file.seek(start)
    for line in filter(None, file.read(end - start).split(b"\n")[:-1]):
        record = decode_line(line)
        if record is not None and record.keys() >= ENVELOPE:
            yield record
