"""The decode kernel's library."""

from __future__ import annotations

from pathlib import Path

from miles.models.compiled import build

DECODE = build.Sources("decode", Path(__file__).parent, ("decode.cpp", "model.cpp"))


def library(compiler: str) -> Path:
    """See `models.compiled.build.library`."""
    return build.library(compiler, DECODE)
