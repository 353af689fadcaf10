"""A run as tables: metrics (one row per step), events and phases, as Parquet or CSV.

Only what still counts is in them: rows of abandoned attempts are left out. A metric that a step does not have
is null; NaN and infinities stay what they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from miles.record import RunReader
from miles.record.encoding import plain

if TYPE_CHECKING:
    import pyarrow

ENVELOPE = ("kind", "writer", "attempt", "seq", "time", "step")
COMPACTED = "compacted"
"""Directory of a run that holds its record as Parquet."""


def write_tables(reader: RunReader, directory: Path, table_format: str) -> list[Path]:
    """Write metrics, events and phases into `directory`, replacing earlier ones; returns the files.

    `table_format` is one of `TABLE_FORMATS`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in TABLES.items():
        path = directory / f"{name}.{table_format}"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        WRITERS[table_format](make(reader), temporary)
        os.replace(temporary, path)
        written.append(path)
    return written


def compact(run_dir: str | Path) -> list[Path]:
    """Write the record of a run as Parquet into `<run_dir>/compacted`; the event files stay as they are."""
    reader = RunReader(run_dir)
    return write_tables(reader, reader.layout.root / COMPACTED, "parquet")


def metrics_table(reader: RunReader) -> pyarrow.Table:
    """step int64, time float64 (epoch seconds), attempt int64, and one float64 column per metric."""
    import pyarrow

    rows = reader.rows()
    steps = {row.step: i for i, row in enumerate(rows)}
    columns: dict[str, Any] = {
        "step": pyarrow.array([row.step for row in rows], pyarrow.int64()),
        "time": pyarrow.array([row.time for row in rows], pyarrow.float64()),
        "attempt": pyarrow.array([row.attempt for row in rows], pyarrow.int64()),
    }
    for name, series in sorted(reader.history.series.items()):
        column: list[float | None] = [None] * len(rows)
        for step, value in series:
            column[steps[step]] = value
        columns[name] = pyarrow.array(column, pyarrow.float64(), from_pandas=False)
    return pyarrow.table(columns)


def events_table(reader: RunReader) -> pyarrow.Table:
    """The envelope of every event that is neither a metric nor a phase, and the rest of it as JSON text."""
    import pyarrow

    schema = pyarrow.schema(
        [
            ("kind", pyarrow.string()),
            ("writer", pyarrow.string()),
            ("attempt", pyarrow.int64()),
            ("seq", pyarrow.int64()),
            ("time", pyarrow.float64()),
            ("step", pyarrow.int64()),
            ("fields", pyarrow.string()),
        ]
    )
    rows = [{name: event.get(name) for name in ENVELOPE} | _fields(event) for event in reader.events()]
    return pyarrow.Table.from_pylist(rows, schema)


def phases_table(reader: RunReader) -> pyarrow.Table:
    """Every phase: start in epoch seconds; `seconds` is null while it is open, `error` what ended it."""
    import pyarrow

    schema = pyarrow.schema(
        [
            ("name", pyarrow.string()),
            ("step", pyarrow.int64()),
            ("writer", pyarrow.string()),
            ("attempt", pyarrow.int64()),
            ("start", pyarrow.float64()),
            ("seconds", pyarrow.float64()),
            ("error", pyarrow.string()),
        ]
    )
    return pyarrow.Table.from_pylist([vars(phase) for phase in reader.phases()], schema)


TABLES: dict[str, Callable[[RunReader], pyarrow.Table]] = {
    "metrics": metrics_table,
    "events": events_table,
    "phases": phases_table,
}


def _fields(event: dict[str, Any]) -> dict[str, str]:
    rest = {name: value for name, value in event.items() if name not in ENVELOPE}
    return {"fields": orjson.dumps(plain(rest, (), []), default=str).decode()}


def _write_parquet(table: pyarrow.Table, path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(table, path, compression="zstd")


def _write_csv(table: pyarrow.Table, path: Path) -> None:
    from pyarrow import csv

    csv.write_csv(table, path)


WRITERS: dict[str, Callable[[pyarrow.Table, Path], None]] = {"parquet": _write_parquet, "csv": _write_csv}
TABLE_FORMATS = tuple(WRITERS)
