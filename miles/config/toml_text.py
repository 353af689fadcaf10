"""Values as TOML text."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def literal(value: Any) -> str:
    """The TOML literal of a string, number, boolean, list or table (as an inline table)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, dict):
        entries = ", ".join(f"{key(name)} = {literal(item)}" for name, item in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    return str(value)


def key(name: str) -> str:
    """A key, in quotes where TOML needs them."""
    return name if _BARE.fullmatch(name) else literal(name)


def _number(value: float) -> str:
    """The shortest form that reads back as the same float; rates as people write them, 4e-4."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e16):
        mantissa, _, exponent = f"{Decimal(repr(value)):e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return repr(value)
