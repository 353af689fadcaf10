"""What the table says of one metric."""

from __future__ import annotations

from dataclasses import dataclass

FRACTION = "fraction"
NATS = "nats"
TOKENS = "tokens"
SECONDS = "s"
RATE = "tokens/s"


@dataclass(frozen=True)
class Band:
    """A healthy range; an open side is None. Bounds belong to the range."""

    low: float | None = None
    high: float | None = None

    def contains(self, value: float) -> bool:
        """Whether `value` is healthy; a NaN never is."""
        above = value >= self.low if self.low is not None else value == value
        below = value <= self.high if self.high is not None else value == value
        return above and below

    def __str__(self) -> str:
        if self.low is None:
            return f"≤ {self.high:g}"
        if self.high is None:
            return f"≥ {self.low:g}"
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g} – {self.high:g}"


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    meaning: str
    unit: str
    healthy: Band | None
    moved_by: str

    @property
    def group(self) -> str:
        return self.name.split("/", 1)[0]
