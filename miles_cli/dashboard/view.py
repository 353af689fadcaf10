"""What the person at the keyboard chose: panels, scale, place in time. Plain state, no widget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from miles_cli.dashboard.panels import Panel, metric_panel, natural, panels_of, passes, presets_of
from miles_cli.dashboard.snapshot import RunSnapshot

NORMAL, HALF, FULL = "normal", "half", "full"
MODES = (NORMAL, HALF, FULL)
WINDOWS: tuple[int | None, ...] = (None, 1000, 200, 50)
"""Steps shown: all, or the last so many."""


@dataclass(frozen=True)
class View:
    """The state of the board. Every change is a new View."""

    preset: str = "overview"
    toggled: tuple[tuple[str, str, bool], ...] = ()
    """(preset, panel, shown) for panels that were switched on or off by hand."""
    focus: int = 0
    """Place of the focused panel among those shown."""
    mode: str = NORMAL
    page: int = 0
    log: bool = False
    averaged: bool = True
    shared: bool = True
    """Whether the inspected step is shown in every chart, or in the focused one only."""
    window: int | None = None
    cursor: int | None = None
    query: str = ""
    pinned: tuple[str, ...] = field(default=())
    """Metrics called up by name; they replace the preset until escape."""

    def with_(self, **changes: object) -> View:
        return replace(self, **changes)  # type: ignore[arg-type]

    def candidates(self, snapshot: RunSnapshot) -> list[Panel]:
        """Panels in their numbered order: those of the preset, or metrics called up by a filter or a name."""
        if self.pinned:
            return [metric_panel(name) for name in self.pinned]
        if self.query:
            names = sorted(snapshot.tracks, key=natural)
            return [metric_panel(name) for name in names if passes(name, self.query)]
        return panels_of(self.preset, snapshot.tracks)

    def shown(self, snapshot: RunSnapshot, capacity: int) -> list[tuple[int, Panel]]:
        """(number, panel) of what is on the board: as many as fit, and those switched on by hand."""
        numbered = list(enumerate(self.candidates(snapshot), start=1))
        if self.query or self.pinned:
            page = min(self.page, max(0, (len(numbered) - 1) // capacity))
            return numbered[page * capacity : (page + 1) * capacity]
        choice = {panel: shown for preset, panel, shown in self.toggled if preset == self.preset}
        wanted = [(n, p) for n, p in numbered if choice.get(p.id, True)]
        forced = [(n, p) for n, p in wanted if choice.get(p.id)]
        # Where room is short, panels that have something to show come first.
        rest = sorted(
            ((p.is_empty(snapshot.tracks), n, p) for n, p in wanted if p.id not in choice),
            key=lambda entry: entry[:2],
        )
        filling = [(n, p) for _, n, p in rest[: max(0, capacity - len(forced))]]
        return sorted([*forced, *filling], key=lambda pair: pair[0])

    def toggle(self, number: int, snapshot: RunSnapshot, capacity: int) -> View:
        """Switch panel `number` on or off."""
        candidates = self.candidates(snapshot)
        if self.query or self.pinned or number > len(candidates):
            return self
        panel = candidates[number - 1].id
        on = any(n == number for n, _ in self.shown(snapshot, capacity))
        kept = tuple(t for t in self.toggled if t[:2] != (self.preset, panel))
        return self.with_(toggled=(*kept, (self.preset, panel, not on)))

    def next_preset(self, snapshot: RunSnapshot) -> View:
        names = presets_of(snapshot.tracks)
        # The run in front may have changed since the preset was chosen.
        at = names.index(self.preset) if self.preset in names else -1
        name = names[(at + 1) % len(names)]
        return self.with_(preset=name, focus=0, query="", pinned=(), page=0, mode=NORMAL)

    def next_window(self) -> View:
        return self.with_(window=WINDOWS[(WINDOWS.index(self.window) + 1) % len(WINDOWS)])

    def span(self, snapshots: Sequence[RunSnapshot]) -> tuple[int, int]:
        """First and last step of every chart, the same for all so that they line up."""
        known = [s for s in snapshots if s.tracks]
        first = min((s.first_step for s in known), default=0)
        last = max((s.last_step for s in known), default=0)
        if self.window is not None:
            end = last if self.cursor is None else min(last, max(self.cursor, first + self.window))
            first, last = max(first, end - self.window), end
        return first, max(last, first + 1)
