"""What a diagnosis is made of: a finding, the evidence that made it, and the fixes it proposes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntEnum, StrEnum
from typing import Any


class Severity(StrEnum):
    CRITICAL = "critical"
    """The run is dead, or what it computes now is worthless."""
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class Tier(IntEnum):
    """The order in which findings are told: what keeps a run alive comes before what makes it better."""

    LIVENESS = 0
    NUMERICS = 1
    DATA = 2
    TUNING = 3


class FixKind(StrEnum):
    LIVE = "live"
    """Takes effect in the running run, at a step boundary."""
    RESUME = "resume"
    """Takes effect when the run is resumed from a checkpoint."""
    MANUAL = "manual"
    """Something that only the user can do."""


@dataclass(frozen=True)
class Evidence:
    """One observation in words, with the numbers behind it."""

    text: str
    metric: str | None = None
    points: tuple[tuple[int, float], ...] = ()
    """(step, value) pairs."""


@dataclass(frozen=True)
class Fix:
    """One way out: a patch to the run's config and what it costs. An empty patch is advice in words."""

    text: str
    kind: FixKind
    risk: str
    patch: tuple[tuple[str, Any], ...] = ()
    """(dotted key, new value) pairs; None stands for the default."""
    from_step: int | None = None
    """Resume from the checkpoint of this step; None: the latest one."""
    start_over: bool = False
    """No checkpoint helps: start a new run with the patch."""


@dataclass(frozen=True)
class Match:
    """A rule's signature was found in the record."""

    step: int | None
    """Where it began, None when it belongs to no step."""
    evidence: tuple[Evidence, ...]
    fixes: tuple[Fix, ...]
    cause: str | None = None
    """The cause in this case; None: the rule's general one."""
    severity: Severity | None = None
    """Other than the rule's own."""
    title: str | None = None


@dataclass(frozen=True)
class Finding:
    """One rule that fired."""

    rule: str
    title: str
    severity: Severity
    tier: Tier
    step: int | None
    cause: str
    evidence: tuple[Evidence, ...]
    fixes: tuple[Fix, ...]
    source: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; patches as tables, the tier by name."""
        fixes = [asdict(fix) | {"patch": dict(fix.patch)} for fix in self.fixes]
        return asdict(self) | {"tier": self.tier.name.lower(), "fixes": fixes}
