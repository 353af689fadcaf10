"""All that a painter may look at, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.snapshot import RunSnapshot
from miles_cli.dashboard.symbols import Symbols
from miles_cli.dashboard.view import View


@dataclass(frozen=True)
class Scene:
    """The runs as they are shown, which of them is in front, and the time of day in epoch seconds."""

    runs: tuple[RunSnapshot, ...]
    current: int
    view: View
    now: float
    symbols: Symbols
    frozen: bool = False
    behind: float = 0.0
    """Seconds the view is behind the newest event, when frozen."""
    behind_steps: int = 0

    @property
    def run(self) -> RunSnapshot:
        return self.runs[self.current]


@dataclass(frozen=True)
class Painted:
    """The inside of a box and what stands in its frame. `alarm` colours the frame."""

    title: Line
    note: Line
    body: list[Line]
    alarm: bool = False


def width_of(line: Line) -> int:
    return sum(len(text) for text, _ in line)


def cut(line: Line, width: int) -> Line:
    """The line in exactly `width` cells."""
    out: Line = []
    left = width
    for text, style in line:
        if left <= 0:
            break
        out.append((text[:left], style))
        left -= len(text[:left])
    return [*out, (" " * left, "")] if left else out


def spread(left: list[Line], right: list[Line], width: int, between: str) -> Line:
    """Fields at both ends of a row. What does not fit goes: the last on the left, then the last on the right;
    the first of either side stay longest."""
    left, right = list(left), list(right)
    while left and _spread_width(left, right, between) > width:
        if len(left) > 1:
            left.pop()
        elif right:
            right.pop()
        else:
            break
    a, b = _joined(left, between), _joined(right, between)
    gap = max(1, width - width_of(a) - width_of(b))
    return cut([*a, (" " * gap, ""), *b], width)


def _spread_width(left: list[Line], right: list[Line], between: str) -> int:
    return width_of(_joined(left, between)) + width_of(_joined(right, between)) + 2


def _joined(fields: list[Line], between: str) -> Line:
    out: Line = []
    for i, part in enumerate(fields):
        out.extend([(between, "axis")] if i else [])
        out.extend(part)
    return out
