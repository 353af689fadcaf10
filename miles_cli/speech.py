"""What a running command says, on streams that may fail: a run does not end with its audience."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def say(text: str, stream: TextIO) -> None:
    """Write one line now. Once the stream takes no more, it and all later output go nowhere.

    A reader that has gone (`| head`) is nobody's mistake; anything else, as a full disk, is told on stderr.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        silence(stream)
        if not isinstance(error, BrokenPipeError) and stream is not sys.stderr:
            say(
                f"output cannot be written any more: {error.strerror}; the run goes on without it", sys.stderr
            )


def silence(stream: TextIO) -> None:
    """Send what is still buffered, and all that follows, nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
