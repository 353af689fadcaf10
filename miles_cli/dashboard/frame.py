"""The box around a panel: number, title and value on its upper edge, the healthy range at the right."""

from __future__ import annotations

from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.scene import Painted, cut, width_of
from miles_cli.dashboard.symbols import Symbols


def frame(painted: Painted, width: int, focused: bool, symbols: Symbols) -> list[Line]:
    """The panel in its box. Focus changes the shape of the box, an alarm its colour and title."""
    corners = symbols.frame_focused if focused else symbols.frame
    style = "frame_alarm" if painted.alarm else "frame_focused" if focused else "frame"
    vertical = corners[5]
    inner = width - 2
    sides = [[(vertical, style), *cut(line, inner), (vertical, style)] for line in painted.body]
    bottom: Line = [(corners[3] + corners[4] * inner + corners[2], style)]
    return [_top(painted, width, corners, style), *sides, bottom]


def _top(painted: Painted, width: int, corners: str, style: str) -> Line:
    room = width - 4
    title, note = painted.title, painted.note
    if width_of(title) + 2 + (width_of(note) + 3 if note else 0) > room:
        note = []
    title = cut(title, min(width_of(title), room - 2))
    used = width_of(title) + 2 + (width_of(note) + 2 if note else 0)
    rule = corners[4] * max(0, room - used)
    line: Line = [(corners[0] + corners[4], style), (" ", ""), *title, (" ", ""), (rule, style)]
    line += [(" ", ""), *note, (" ", "")] if note else []
    return [*line, (corners[4] + corners[1], style)]
