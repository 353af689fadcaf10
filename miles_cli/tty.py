"""What the terminal can do, decided once, before anything that draws is imported."""

from __future__ import annotations

import sys
from typing import TextIO

from miles.environment import get


def is_interactive(stream: TextIO | None = None) -> bool:
    """Whether redrawing and colour are welcome on this stream (default: stderr, where progress goes)."""
    stream = sys.stderr if stream is None else stream
    return stream.isatty() and get("TERM") != "dumb" and get("CI") is None


def has_colour(stream: TextIO | None = None) -> bool:
    """Whether colour may be used: an interactive stream and no NO_COLOR."""
    return is_interactive(stream) and get("NO_COLOR") is None
