"""A part of a file that looks like a file of its own."""

from __future__ import annotations

import io
import os
from typing import IO


class FilePart(io.RawIOBase):
    """`length` bytes from `begin` on; the file must not be moved in by others meanwhile."""

    def __init__(self, file: IO[bytes], begin: int, length: int) -> None:
        self._file, self._begin, self._length = file, begin, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(self._length - self._at, 0))
        self._file.seek(self._begin + self._at)
        count = self._file.readinto(memoryview(buffer)[:wanted])  # type: ignore[attr-defined]
        self._at += count
        return int(count)
