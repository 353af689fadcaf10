"""The one widget behind the windows: it shows composed lines and repaints only the cells that changed."""

from __future__ import annotations

from itertools import zip_longest

from rich.segment import Segment
from textual import events
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.styles import style_of


class Stage(Widget, can_focus=True):
    """Shows the lines of a screenful."""

    DEFAULT_CSS = "Stage { width: 1fr; height: 1fr; }"

    class Clicked(Message):
        """A mouse click on a cell."""

        def __init__(self, x: int, y: int, times: int) -> None:
            super().__init__()
            self.x, self.y, self.times = x, y, times

    class Resized(Message):
        """There is another number of cells to fill."""

    def __init__(self) -> None:
        super().__init__(id="stage")
        self._lines: list[Line] = []
        self.repaints = 0
        """How many times something was redrawn."""

    def show(self, lines: list[Line]) -> None:
        """Replace what is shown; a line that did not change costs nothing on the wire."""
        changed = [
            Region(0, y, self.size.width, 1)
            for y, (old, new) in enumerate(zip_longest(self._lines, lines))
            if old != new
        ]
        self._lines = lines
        if changed:
            self.repaints += 1
            self.refresh(*changed)

    def plain(self) -> str:
        """The screen as text."""
        return "\n".join("".join(text for text, _ in line).rstrip() for line in self._lines)

    def render_line(self, y: int) -> Strip:
        if y >= len(self._lines):
            return Strip.blank(self.size.width, style_of(""))
        return Strip([Segment(text, style_of(style)) for text, style in self._lines[y]])

    def on_resize(self) -> None:
        self.post_message(self.Resized())

    def on_click(self, event: events.Click) -> None:
        self.post_message(self.Clicked(event.x, event.y, event.chain))
