"""A pseudo-terminal with a real dashboard in it: keys go in, the screen comes out as text."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable

from e2e_support import PATIENCE_S

_ESCAPES = re.compile(rb"\x1b(\[[0-9;?<=>]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>78])")


class Terminal:
    """Runs `miles ARGUMENTS` on a terminal of its own."""

    def __init__(self, arguments: list[str], environment: dict[str, str], size: tuple[int, int]) -> None:
        columns, rows = size
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            variables = environment | {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
            os.execve(sys.executable, [sys.executable, "-m", "miles_cli", *arguments], variables)
        self.output = b""
        self._exit_code: int | None = None
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                self.output += os.read(self._master, 1 << 16)
            except OSError:
                return  # the program has closed its terminal

    def press(self, *keys: str) -> None:
        for key in keys:
            os.write(self._master, {"enter": "\r", "escape": "\x1b"}.get(key, key).encode())
            time.sleep(0.2)

    def text(self) -> str:
        """Everything that was drawn since the start, without escape codes."""
        return _ESCAPES.sub(b"", self.output).decode("utf-8", "replace")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.exit_code is None, (
                f"ended with {self.exit_code} before {what}:\n{self.text()[-2000:]}"
            )
            assert time.monotonic() < deadline, f"{what} did not happen:\n{self.text()[-4000:]}"
            time.sleep(0.1)

    def wait_for_text(self, text: str) -> None:
        self.wait_for(lambda: text in self.text(), f"{text!r}")

    @property
    def exit_code(self) -> int | None:
        if self._exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._exit_code = os.waitstatus_to_exitcode(status) if pid else None
        return self._exit_code

    def end(self) -> int:
        """Wait for the end of the program; returns its exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while (code := self.exit_code) is None:
            assert time.monotonic() < deadline, f"it did not end:\n{self.text()[-2000:]}"
            time.sleep(0.05)
        return code

    def leave(self) -> int:
        """Press q until the program ends; returns its exit code. An open window takes the first."""
        deadline = time.monotonic() + PATIENCE_S
        while self.exit_code is None:
            assert time.monotonic() < deadline, f"it did not end:\n{self.text()[-2000:]}"
            with contextlib.suppress(OSError):  # it closed its terminal just now
                self.press("q")
        return self.end()

    def close(self) -> None:
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._master)
