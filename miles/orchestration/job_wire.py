"""What a submitted job tells the machine that launched it: marked lines in its own log, read over HTTP.

The log is the one channel that every Ray cluster gives to whoever may submit to it: no shared file system and
no port beside the dashboard's is needed. Everything unmarked in the log is talk.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

MARK = "\x1emiles "
"""Begins a marked line: ASCII's record separator occurs in no text."""
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_PREFIX = re.compile(r"^\([^()]*\bpid=\d+[^()]*\) ")
"""What Ray puts before the lines of workers: `(name pid=123) `."""


class WireWriter:
    """The job's side; several threads may send."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._busy = threading.Lock()

    def send(self, kind: str, **fields: Any) -> None:
        """One message, one line."""
        line = MARK + json.dumps({"kind": kind, **fields}, ensure_ascii=True) + "\n"
        with self._busy:
            self._stream.write(line)
            self._stream.flush()


class WireReader:
    """The launching side: pieces of the log in, messages and lines of talk out."""

    def __init__(self) -> None:
        self.consumed = 0
        """Characters of the log taken in so far."""
        self._rest = ""

    def feed(self, text: str) -> Iterator[dict[str, Any] | str]:
        """Messages (dicts) and talk (plain lines) that `text` completes."""
        self.consumed += len(text)
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            yield from self._line(line)

    def finish(self) -> Iterator[dict[str, Any] | str]:
        """What a last line without its newline holds."""
        line, self._rest = self._rest, ""
        if line:
            yield from self._line(line)

    @staticmethod
    def _line(line: str) -> Iterator[dict[str, Any] | str]:
        talk, mark, message = line.partition(MARK)
        if not mark or talk.strip():
            yield plain(line if not mark else talk)
        if mark:
            yield json.loads(message)


def plain(text: str) -> str:
    """A line without colours and without Ray's prefix."""
    return _PREFIX.sub("", _COLOUR.sub("", text)).rstrip("\r")
