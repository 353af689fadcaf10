"""Two runs side by side: what they were told, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from miles.record import RunReader
from miles_cli.dashboard.numbers import number

RESULTS = (
    "rollout/raw_reward",
    "train/loss",
    "train/grad_norm",
    "rollout/response_len/mean",
    "perf/step_time",
)
"""Last values that are compared, beside every evaluation and the means of the reward."""


def results(reader: RunReader) -> dict[str, Any]:
    """What came of a run; a value that was not measured is absent."""
    series = reader.history.series
    names = [name for name in series if name.startswith("eval/")]
    values: dict[str, Any] = {"status": reader.status().value, "step": reader.history.last_step or 0}
    values |= {name: series[name].last for name in (*sorted(names), *RESULTS) if name in series}
    return values


def result_rows(left: RunReader, right: RunReader) -> list[dict[str, Any]]:
    """One row per result that either run has, equal ones too."""
    ours, theirs = results(left), results(right)
    return [{"name": n, "left": ours.get(n), "right": theirs.get(n)} for n in dict.fromkeys((*ours, *theirs))]


def result_lines(rows: list[dict[str, Any]], left: str, right: str) -> Iterator[str]:
    """The rows as a table."""
    table = [("", left, right), *((row["name"], _cell(row["left"]), _cell(row["right"])) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(3)]
    for line in table:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else number(value)
