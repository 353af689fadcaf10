"""JSON for stdout, in which NaN and infinities are strings, as in the run record."""

from __future__ import annotations

from typing import Any

import orjson

from miles.record.encoding import plain


def json_text(value: Any, indent: bool = True) -> str:
    """`value` as JSON text; non-finite numbers read "nan", "inf" and "-inf"."""
    option = orjson.OPT_INDENT_2 if indent else 0
    return orjson.dumps(plain(value, (), []), default=str, option=option).decode()
