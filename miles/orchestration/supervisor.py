"""Who may end a run early, and how: signals, the control inbox, and the non-finite policy."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_AFTER_SKIPPED_STEPS = 3
"""Skipped optimizer steps in a row that end a run: skipping cannot mend a diverged policy."""


class Supervisor:
    """Collects wishes to stop; the loop asks at step boundaries only, so a step is never cut in two."""

    def __init__(self, heard: Callable[[], None] | None = None) -> None:
        """`heard` tells the user that the first signal was heard; it is called in a thread of its own,
        because the signal may have interrupted somebody who is writing."""
        self._heard = heard
        self.stop_status: str | None = None
        self.signal: int | None = None
        """The signal that asked for the stop."""

    def request_stop(self, status: str) -> None:
        """Ask for a stop after the running step. The first reason given is the one reported."""
        self.stop_status = self.stop_status or status

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a graceful stop; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def listen_again(self) -> None:
        """Take the signals back from a library that installed handlers of its own."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_status is not None:
            raise KeyboardInterrupt
        self.signal = number
        self.request_stop("interrupted")
        if self._heard is not None:
            threading.Thread(target=self._heard, name="heard", daemon=True).start()
