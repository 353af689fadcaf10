"""How far a conversion is: one line that is redrawn in a terminal; elsewhere a line now and then."""

from __future__ import annotations

import shutil
import threading
import time
from typing import TextIO

from miles_cli.speech import say
from miles_cli.tty import is_interactive
from miles_cli.units import binary_bytes, duration

REDRAW_SECONDS = 0.2
LINE_SECONDS = 10.0
"""Between two lines where nothing is redrawn."""
BAR_WIDTH = 20


class ConvertProgress:
    """Called by every worker when it has finished weights; draws on `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = is_interactive(stream)
        self._began = time.monotonic()
        self._first: int | None = None
        self._drawn = 0.0 if self._live else self._began
        self._guard = threading.Lock()

    def __call__(self, done: int, total: int, file: str) -> None:
        with self._guard:
            if self._first is None:
                self._first = done
            if self._live:
                self._redraw(done, total, file)
            elif time.monotonic() - self._drawn >= LINE_SECONDS:
                self._drawn = time.monotonic()
                say(self._line(done, total, file), self._stream)

    def notice(self, text: str) -> None:
        """A line of its own, which stays."""
        self.end()
        say(text, self._stream)

    def end(self) -> None:
        """Leave the terminal's line empty."""
        if self._live and self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _redraw(self, done: int, total: int, file: str) -> None:
        now = time.monotonic()
        if now - self._drawn < REDRAW_SECONDS and done < total:
            return
        self._drawn = now
        filled = BAR_WIDTH * done // max(total, 1)
        bar = "█" * filled + "░" * (BAR_WIDTH - filled)
        line = f"{bar} {self._line(done, total, file)}"
        self._stream.write("\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K")
        self._stream.flush()

    def _line(self, done: int, total: int, file: str) -> str:
        """Speed and time left are those of this start: what an earlier one did is not counted."""
        seconds = time.monotonic() - self._began
        speed = (done - (self._first or 0)) / seconds if seconds > 0 else 0.0
        parts = [f"{100 * done // max(total, 1):>3} %", f"{binary_bytes(done)} of {binary_bytes(total)}"]
        if speed > 0:
            parts += [f"{binary_bytes(speed)}/s", f"{duration((total - done) / speed)} left"]
        return "  ".join([*parts, file])
