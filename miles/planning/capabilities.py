"""Which settings each backend really uses, read from `capabilities.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("capabilities.toml")


@dataclass(frozen=True)
class Part:
    """One backend: whether it can be chosen at all, the settings it uses, and the values it takes of some."""

    kind: str
    name: str
    available: bool
    instead: str
    fields: frozenset[str]
    values: Mapping[str, tuple[Any, ...]]
    on: frozenset[str] = frozenset({"cpu", "gpu"})
    """Where it runs."""
    planned: frozenset[str] = frozenset()
    """What it is going to use where it does not run yet."""

    def here(self, on_gpus: bool) -> Part:
        """This part in a run on GPUs or without: as it is, or not available."""
        if ("gpu" if on_gpus else "cpu") in self.on:
            return self
        return replace(self, available=False, fields=self.planned or self.fields, values={})

    def uses(self, setting: str) -> bool:
        """Whether it lists a setting, by name or with its whole section."""
        return setting in self.fields or f"{setting.partition('.')[0]}.*" in self.fields


@dataclass(frozen=True)
class Capabilities:
    """The settings of the table."""

    common: frozenset[str]
    """Settings that every run uses."""
    values: Mapping[str, tuple[Any, ...]]
    """The supported values of those that have limits in every run."""
    parts: Mapping[tuple[str, str], Part]
    instead: Mapping[str, str]
    """For every setting that no available part uses: the nearest thing that works."""


@cache
def capabilities() -> Capabilities:
    """The shipped table."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    parts = {
        (kind, name): _part(kind, name, row)
        for kind in ("trainer", "engine", "executor")
        for name, row in table[kind].items()
    }
    return Capabilities(
        common=frozenset(table["common"]["fields"]),
        values=_values(table["common"]),
        parts=parts,
        instead={setting: group["instead"] for group in table["unsupported"] for setting in group["fields"]},
    )


def _part(kind: str, name: str, row: Mapping[str, Any]) -> Part:
    return Part(
        kind=kind,
        name=name,
        available=row["available"],
        instead=row.get("instead", ""),
        fields=frozenset(row["fields"]),
        values=_values(row),
        on=frozenset(row.get("on", ("cpu", "gpu"))),
        planned=frozenset(row.get("planned", ())),
    )


def _values(row: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {setting: tuple(values) for setting, values in row.get("values", {}).items()}
