"""What every live exporter is: something that takes metrics in the order in which the run wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from miles.record import RunReader
from miles.record import events as kinds


class Sink(Protocol):
    """Copies a run's metrics somewhere else. A metric that a step does not have is left out, never zero."""

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        """Take in metrics of `step`, said at `time` (epoch seconds). A step may come in several parts."""
        ...

    def rewind(self, step: int) -> None:
        """The run goes on after `step`; whatever was logged of later steps no longer counts."""
        ...

    def flush(self) -> None:
        """Make everything logged so far visible to others."""
        ...

    def close(self) -> None:
        """The run has ended: finish the files."""
        ...


def replay(reader: RunReader, sink: Sink) -> int:
    """Copy all live rows of a run into `sink`; returns how many."""
    rows = reader.rows()
    for row in rows:
        sink.log(row.step, row.time, row.metrics)
    return len(rows)


def pass_on(records: Iterable[dict[str, Any]], sinks: Iterable[Sink]) -> None:
    """Hand new records of the run to every sink, in order."""
    sinks = tuple(sinks)
    for record in records:
        for sink in sinks:
            if record["kind"] == kinds.METRICS:
                sink.log(record["step"], record["time"], record["metrics"])
            elif record["kind"] == kinds.RESUME:
                sink.rewind(record["step"])
