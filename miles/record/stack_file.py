"""Answering where a process stands: SIGUSR2 makes it write the stacks of all its threads to a file.

`faulthandler` answers in the signal handler itself, so a process that hangs in a C extension answers too.
"""

from __future__ import annotations

import faulthandler
import signal
from pathlib import Path
from typing import BinaryIO

STACK_SIGNAL = signal.SIGUSR2


class StackFile:
    """Registers the handler, unless the process uses the signal for something else. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO | None = None
        if signal.getsignal(STACK_SIGNAL) is signal.SIG_DFL:
            self._file = path.open("wb")
            faulthandler.register(STACK_SIGNAL, self._file, all_threads=True)

    def close(self) -> None:
        """Give the signal back."""
        if self._file is not None:
            faulthandler.unregister(STACK_SIGNAL)
            self._file.close()
            self._file = None
