"""Rows of a prompt file, read one at a time: JSON lines or Parquet, whole or a slice `path@[a:b]`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from miles.data import tasks
from miles.errors import DataError

if TYPE_CHECKING:
    import pyarrow

Row = dict[str, Any]

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")


class BadJson(ValueError):
    """A line that is not one JSON object."""


class RowFile(Protocol):
    """Random access to the rows of one file; `read` may raise BadJson."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row: ...

    def line(self, index: int) -> int:
        """Where a person finds the row: line of a text file, row of a table, both counted from 1."""
        ...


@dataclass(frozen=True)
class DataPath:
    """`path@[a:b]` taken apart; bounds follow Python's slices over the rows of the file."""

    path: Path
    start: int | None = None
    stop: int | None = None

    def indices(self, num_rows: int) -> range:
        """The row indices that the slice selects."""
        return range(num_rows)[self.start : self.stop]

    def __str__(self) -> str:
        if self.start is None and self.stop is None:
            return str(self.path)
        start, stop = ("" if bound is None else str(bound) for bound in (self.start, self.stop))
        return f"{self.path}@[{start}:{stop}]"


def parse_data_path(text: str) -> DataPath:
    """Split off the slice and resolve a built-in name. Raises DataError for a malformed slice."""
    name, at, bounds = text.rpartition("@[")
    if not at:
        name, start, stop = text, None, None
    else:
        match = re.fullmatch(r"(-?\d+)?:(-?\d+)?\]", bounds)
        if match is None:
            raise DataError(
                f"cannot read the slice @[{bounds}",
                where=text,
                fix="write path@[a:b], for example data.jsonl@[0:512]",
            )
        start, stop = (None if bound is None else int(bound) for bound in match.groups())
    path = tasks.resolve_builtin(name) if tasks.is_builtin(name) else Path(name).expanduser()
    return DataPath(path, start, stop)


def open_rows(path: Path) -> RowFile:
    """Open a prompt file by its suffix. Raises DataError when it is missing, empty or of an unknown kind."""
    if not path.is_file():
        raise DataError(
            "no such prompt file" if not path.exists() else "the prompt path is a directory, not a file",
            where=str(path),
            fix="name a JSONL or Parquet file, or builtin:sort/train",
        )
    if path.suffix == ".parquet":
        rows: RowFile = ParquetRows(path)
    elif path.suffix in JSON_LINES_SUFFIXES:
        rows = JsonLinesRows(path)
    else:
        raise DataError(
            f"a prompt file of unknown kind {path.suffix or '(no suffix)'!r}",
            where=str(path),
            fix=f"use JSON lines ({', '.join(JSON_LINES_SUFFIXES)}) or Parquet (.parquet)",
        )
    if len(rows) == 0:
        raise DataError("the prompt file is empty", where=str(path), why="it holds no row")
    return rows


def file_digest(path: Path) -> str:
    """SHA-256 of a file in 16 hex digits: tells whether a resumed run still reads the same prompts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class JsonLinesRows:
    """JSON lines behind an index of byte offsets; blank lines are not rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: list[int] = []
        self._lines: list[int] = []
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._offsets)

    def line(self, index: int) -> int:
        return self._lines[index]

    def read(self, index: int) -> Row:
        self._file.seek(self._offsets[index])
        return _parse_object(self._file.readline().rstrip(b"\r\n"))


def _parse_object(line: bytes) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadJson(f"not JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise BadJson(f"not UTF-8: byte {line[error.start]:#04x} at column {error.start + 1}") from error
    if not isinstance(value, dict):
        raise BadJson("not a JSON object (a prompt file holds one object per line)")
    return value


class ParquetRows:
    """A Parquet table, kept in its columnar form; rows become Python values when they are read."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            self._table: pyarrow.Table = pyarrow.parquet.read_table(path, memory_map=True)
        except pyarrow.ArrowInvalid as error:
            raise DataError(
                "not a readable Parquet file",
                where=str(path),
                why=str(error).splitlines()[0],
                fix="the file may be truncated; write or download it again",
            ) from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def line(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> Row:
        rows: list[Row] = self._table.slice(index, 1).to_pylist()
        return rows[0]


def iterate(rows: RowFile, indices: range) -> Iterator[tuple[int, Row | BadJson]]:
    """Every selected row with its index; a broken line comes as the error that tells why."""
    for index in indices:
        try:
            yield index, rows.read(index)
        except BadJson as error:
            yield index, error
