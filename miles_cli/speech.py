"""What a running command says, on streams whose readers may go away: a run does not end with its audience."""

from __future__ import annotations

import os
from typing import TextIO


def say(text: str, stream: TextIO) -> None:
    """Write one line now; once the reader has gone (`| head`), it and all later output go nowhere."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
