"""Measured sections of a page, between marks of their own."""

from __future__ import annotations

import sys
from pathlib import Path


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name: begin -->` and `<!-- name: end -->`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = page.read_text().partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        sys.exit(f"{page} has no marks {begin} and {end}")
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}")
