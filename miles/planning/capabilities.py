"""Which settings each backend really uses, read from `capabilities.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    gpu_fields: frozenset[str] = frozenset()
    """Settings that it uses on GPUs beside the others."""
    gpu_values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """What it takes of some settings there, where that differs; nothing: any value."""

    def here(self, on_gpus: bool) -> Part:
        """This part in a run on GPUs or without: as it is there, or not available."""
        if ("gpu" if on_gpus else "cpu") not in self.on:
            return replace(self, available=False, values={})
        if not on_gpus:
            return self
        values = {setting: held for setting, held in {**self.values, **self.gpu_values}.items() if held}
        return replace(self, fields=self.fields | self.gpu_fields, values=values)

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
        gpu_fields=frozenset(row.get("gpu", {}).get("fields", ())),
        gpu_values=_values(row.get("gpu", {})),
    )


def _values(row: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {setting: tuple(values) for setting, values in row.get("values", {}).items()}
