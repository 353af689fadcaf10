"""What a front end may listen to while a run goes on."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Called in the driver's thread, between steps; must return quickly."""

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        """Something happened: `stage`, `checkpoint`, `eval`, `alert`, `non_finite`, `bad_rows`, …"""

    def on_step(self, row: dict[str, Any]) -> None:
        """A training step ended; `row` has `step`, `total` and the step's metrics under `metrics`."""


class SilentObserver:
    """Listens to nothing."""

    def on_event(self, kind: str, fields: dict[str, Any]) -> None: ...

    def on_step(self, row: dict[str, Any]) -> None: ...
