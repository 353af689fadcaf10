"""One record, one line of JSON, in which NaN and infinities survive.

JSON has no non-finite numbers. They are written as the strings "nan", "inf" and "-inf", and the line lists
where they stand under the key `nonfinite`, so that a text that happens to read "nan" stays a text.
"""

from __future__ import annotations

import math
from typing import Any

import orjson

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE
_INT64 = 2**63
NONFINITE = "nonfinite"


def encode_line(record: dict[str, Any]) -> bytes:
    """`record` as one JSON line with its newline. Values that JSON does not know become their `str`."""
    try:
        line = orjson.dumps(record, default=str, option=_OPTIONS)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits, or text that is not valid Unicode
        return _encode_plain(record)
    # orjson writes a non-finite float as null, so only a line with a null can hold one.
    return _encode_plain(record) if b"null" in line else line


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The record of one line, or None when the line is torn or is not a record."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(record, dict):
        return None
    return restore(record) if NONFINITE in record else record


def restore(record: dict[str, Any]) -> dict[str, Any]:
    """Turn the strings that `record[NONFINITE]` points at back into floats, in place."""
    for path in record.pop(NONFINITE):
        holder: Any = record
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = float(holder[path[-1]])
    return record


def plain(value: Any, path: tuple[str | int, ...], nonfinite: list[tuple[str | int, ...]]) -> Any:
    """`value` in types that JSON holds; the paths of non-finite floats are appended to `nonfinite`."""
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(path)
        return str(value)
    if isinstance(value, dict):
        return {str(k): plain(v, (*path, str(k)), nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, (*path, i), nonfinite) for i, v in enumerate(value)]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        return str(value)
    return value


def _encode_plain(record: dict[str, Any]) -> bytes:
    nonfinite: list[tuple[str | int, ...]] = []
    body = plain(record, (), nonfinite)
    if nonfinite:
        body[NONFINITE] = nonfinite
    return orjson.dumps(body, default=str, option=_OPTIONS)
