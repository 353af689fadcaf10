"""The matrix feature x backend x hardware, read from `capabilities.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from miles.planning.capabilities import TABLE
from miles.planning.hardware import Generation

KINDS = ("trainer", "engine")


class State(StrEnum):
    """How far a part is with a feature on one generation of hardware."""

    SUPPORTED = "supported"
    """A test in this repository runs it there."""
    WIRED = "wired"
    """Written against the real library; never run there."""
    UNSUPPORTED = "unsupported"


@dataclass(frozen=True)
class Feature:
    """One row. `asked` holds the conditions of which any one asks for it."""

    name: str
    title: str
    hardware: frozenset[Generation]
    asked: tuple[str, ...]
    instead: str
    cells: Mapping[tuple[str, str, Generation], State]
    """(kind of part, part, generation) -> state, without the unsupported ones."""
    concerns: frozenset[str]
    """Kinds of part that the feature is a matter of."""

    def state(self, kind: str, part: str, generation: Generation) -> State:
        """The state of one cell."""
        return self.cells.get((kind, part, generation), State.UNSUPPORTED)


@cache
def features() -> Mapping[str, Feature]:
    """The shipped matrix by feature."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["feature"]
    return {name: _feature(name, row) for name, row in rows.items()}


def _feature(name: str, row: Mapping[str, object]) -> Feature:
    parts = {kind: row[kind] for kind in KINDS if kind in row}
    cells = {
        (kind, part, generation): State(state)
        for kind, table in parts.items()
        for part, states in table.items()  # type: ignore[attr-defined]
        for generation, state in states.items()
    }
    return Feature(
        name=name,
        title=str(row["title"]),
        hardware=frozenset(row["hardware"]),  # type: ignore[call-overload]
        asked=tuple(row["asked"]),  # type: ignore[arg-type]
        instead=str(row["instead"]),
        cells=cells,
        concerns=frozenset(parts),
    )
