"""What a profile says about its own values: the comment above a key."""

from __future__ import annotations

from functools import cache
from itertools import takewhile
from pathlib import Path

from miles.config import Origin, shipped_root

SHIPPED = "profiles/"
"""How the place of a value in a shipped profile begins."""


def comment_above(origin: Origin) -> str:
    """The comment directly above the line of a value, as one line without its full stop."""
    if origin.line is None:
        return ""
    lines = _lines(origin.source)[: origin.line - 1]
    block = list(takewhile(lambda line: line.startswith("#"), reversed(lines)))
    return " ".join(line.lstrip("# ") for line in reversed(block)).rstrip(".")


@cache
def _lines(source: str) -> tuple[str, ...]:
    """The lines of a profile as an origin names it."""
    shipped = shipped_root() / source.removeprefix(SHIPPED)
    path = shipped if source.startswith(SHIPPED) and shipped.is_file() else Path(source)
    return tuple(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
