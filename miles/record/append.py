"""A file of lines that several attempts append to and that a kill may leave torn."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import orjson

_BLOCK = 1 << 16


class AppendFile:
    """An unbuffered O_APPEND file; every method may raise OSError.

    Opening it mends a torn last line: a whole record that only lacks its newline is completed, anything else
    is cut off and counted in `dropped_bytes`.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._torn = False
        self.dropped_bytes = self._mend()

    def write(self, line: bytes) -> None:
        """Write `line` in one call. A short write (disk full) leaves a torn line, ended by the next write."""
        data = b"\n" + line if self._torn else line
        written = os.write(self._fd, data)
        if written:
            self._torn = written < len(data)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file. A later write fails with OSError instead of reaching whoever got the descriptor."""
        fd, self._fd = self._fd, -1
        os.close(fd)

    def _mend(self) -> int:
        size = os.fstat(self._fd).st_size
        start = self._last_line_start(size)
        if start == size:
            return 0
        tail = os.pread(self._fd, size - start, start)
        try:
            orjson.loads(tail)
        except orjson.JSONDecodeError:
            os.ftruncate(self._fd, start)
            return len(tail)
        self.write(b"\n")
        return 0

    def _last_line_start(self, size: int) -> int:
        """Offset just after the last newline."""
        end = size
        while end > 0:
            begin = max(0, end - _BLOCK)
            newline = os.pread(self._fd, end - begin, begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1
            end = begin
        return 0
