"""Line numbers for the keys of a TOML file, which no TOML reader of the standard library gives.

The scanner only runs over text that `tomllib` has accepted, so it need not recognise errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Path = tuple[str, ...]

_PART = r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'"""
_DOTTED = rf"(?:{_PART})(?:[ \t]*\.[ \t]*(?:{_PART}))*"
_HEADER = re.compile(rf"[ \t]*\[\[?[ \t]*({_DOTTED})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")
_VALUE_TOKEN = re.compile(r"""\"{3}|'{3}|"(?:\\.|[^"\\])*"|'[^']*'|\#.*|[\[{\]}\n]""")
_CLOSING = {'"""': re.compile(r'(?:\\.|[^\\])*?"""', re.S), "'''": re.compile(r".*?'''", re.S)}


def key_lines(text: str) -> dict[Path, int]:
    """The line (from 1) of every table header and key; keys of inline tables are found at their parent's."""
    lines: dict[Path, int] = {}
    table: Path = ()
    for number, start in _statements(text):
        header = _HEADER.match(text, start)
        assignment = _ASSIGNMENT.match(text, start)
        if header:
            table = _parts(header[1])
            lines.setdefault(table, number)
        elif assignment:
            lines.setdefault(table + _parts(assignment[1]), number)
    return lines


def _statements(text: str) -> Iterator[tuple[int, int]]:
    """Line number and offset of every line that is not the inside of a multi-line value."""
    offset, number = 0, 1
    while offset < len(text):
        yield number, offset
        assignment = _ASSIGNMENT.match(text, offset)
        end = _value_end(text, assignment.end()) if assignment else _line_end(text, offset)
        number += text.count("\n", offset, end)
        offset = end


def _value_end(text: str, offset: int) -> int:
    """Offset of the line after the value that begins at `offset`."""
    depth = 0
    while token := _VALUE_TOKEN.search(text, offset):
        offset = token.end()
        if token[0] == "\n" and depth == 0:
            return offset
        if token[0] in _CLOSING:
            closing = _CLOSING[token[0]].match(text, offset)
            assert closing, "tomllib accepted an open string"
            offset = closing.end()
        depth += (token[0] in "[{") - (token[0] in "]}")
    return len(text)


def _line_end(text: str, offset: int) -> int:
    newline = text.find("\n", offset)
    return len(text) if newline < 0 else newline + 1


def _parts(dotted: str) -> Path:
    return tuple(part.strip("\"'") for part in re.findall(_PART, dotted))
