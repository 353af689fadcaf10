"""Where an attempt comes from: who asked for it, what it changed, and the run it is a copy of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.config import ResolvedConfig
from miles.diagnosis.live import LIVE_SETTINGS
from miles.orchestration.stored_config import stored_config

CLI, WATCH, RESTART = "cli", "watch", "restart"
"""Who asks for an attempt: a command, the dashboard, or the run itself after it lost a worker."""


@dataclass(frozen=True)
class Lineage:
    """Stands in the record of every attempt."""

    by: str = CLI
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Dotted settings that were set for this attempt, with the value before and after."""
    parent: str | None = None
    """Path of the run that a new run is a changed copy of."""

    def as_fields(self) -> dict[str, Any]:
        """For an event or meta.json; what there is nothing to say of is left out."""
        said: dict[str, Any] = {"by": self.by}
        if self.changes:
            said["changes"] = {key: list(pair) for key, pair in self.changes.items()}
        return said | ({} if self.parent is None else {"parent": self.parent})

    @property
    def live_patch(self) -> dict[str, float]:
        """What was set of the live settings: it wins over the values in the checkpoint."""
        return {
            key: after
            for key, (_, after) in self.changes.items()
            if key in LIVE_SETTINGS and isinstance(after, int | float)
        }


def changed_settings(
    before: ResolvedConfig, after: ResolvedConfig, keys: Iterable[str]
) -> dict[str, tuple[Any, Any]]:
    """The values of `keys` on both sides, whether or not they differ."""
    return {key: (before.value(key), after.value(key)) for key in keys}


def copied_from(parent: Path, resolved: ResolvedConfig, by: str = CLI) -> Lineage:
    """The lineage of a new run made from the run file of `parent`. Raises RunError without a parent."""
    before = stored_config(parent)
    keys = {*before.origins, *resolved.origins}
    written = [key for key in sorted(keys) if before.is_explicit(key) or resolved.is_explicit(key)]
    pairs = changed_settings(before, resolved, written)
    return Lineage(by, {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}, str(parent.resolve()))
