"""Where a value came from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class OriginKind(StrEnum):
    """The kinds of source, weakest first."""

    DEFAULT = "default"
    DERIVED = "derived"
    PROFILE = "profile"
    RUN_FILE = "run file"
    FLAG = "flag"


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of one value: a file and line, a flag, a rule, or the default."""

    kind: OriginKind
    source: str = ""
    """A file, a flag, or the rule that derived the value."""
    line: int | None = None

    @property
    def is_explicit(self) -> bool:
        """Somebody wrote this value down."""
        return self.kind not in (OriginKind.DEFAULT, OriginKind.DERIVED)

    def __str__(self) -> str:
        if self.kind is OriginKind.DEFAULT:
            return "default"
        if self.kind is OriginKind.DERIVED:
            return f"derived: {self.source}"
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def as_json(self) -> dict[str, Any]:
        """The origin as JSON-able values."""
        entries = {"kind": self.kind.value, "source": self.source, "line": self.line}
        return {key: value for key, value in entries.items() if value not in ("", None)}

    @classmethod
    def from_json(cls, entries: dict[str, Any]) -> Origin:
        """The inverse of `as_json`."""
        return cls(OriginKind(entries["kind"]), entries.get("source", ""), entries.get("line"))


DEFAULT = Origin(OriginKind.DEFAULT)
