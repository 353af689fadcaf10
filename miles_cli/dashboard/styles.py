"""Colours by style name. Nothing is told by colour alone: shapes, signs and words carry it too."""

from __future__ import annotations

from functools import cache

from rich.style import Style

INK, DIM, FAINT, PAPER = "#d7dce4", "#7d8799", "#4a5262", "#0f131a"
GREEN, RED, AMBER, CYAN, BLUE, VIOLET, ROSE = (
    "#7fd99a",
    "#ff6f76",
    "#f2c45f",
    "#5fd4e6",
    "#6ea8fe",
    "#b79cf5",
    "#f59ac0",
)

_STYLES = {
    "": Style(color=INK),
    "axis": Style(color=DIM),
    "label": Style(color=INK),
    "strong": Style(color="#ffffff", bold=True),
    "title": Style(color=INK, bold=True),
    "value": Style(color=CYAN, bold=True),
    "value_bad": Style(color=RED, bold=True),
    "key": Style(color=AMBER, bold=True),
    "line": Style(color=CYAN),
    "line2": Style(color=AMBER),
    "line3": Style(color=VIOLET),
    "line4": Style(color=GREEN),
    "band": Style(color="#3f6f80"),
    "edge": Style(color="#3f7a55"),
    "good": Style(color=GREEN),
    "bad": Style(color=RED, bold=True),
    "critical": Style(color=RED, bold=True),
    "warning": Style(color=AMBER),
    "info": Style(color=BLUE),
    "resumed": Style(color=BLUE),
    "cursor": Style(color="#ffffff", bold=True),
    "faded": Style(color="#39414f"),
    "banner": Style(color=PAPER, bgcolor=AMBER, bold=True),
    "frame": Style(color="#39414f"),
    "frame_focused": Style(color=CYAN),
    "frame_alarm": Style(color=RED),
    "removed": Style(color=RED),
    "added": Style(color=GREEN),
    **{
        f"phase{i}": Style(color=colour)
        for i, colour in enumerate(
            ("#3d8fa3", "#8a6fd1", "#3f9163", "#b0843a", "#a85a7d", "#5577b8", "#7f8a3e", "#7d8799")
        )
    },
    **{
        f"run{i}": Style(color=colour)
        for i, colour in enumerate((CYAN, AMBER, VIOLET, GREEN, ROSE, BLUE, RED, INK))
    },
    **{
        f"heat{i}": Style(color=colour)
        for i, colour in enumerate(
            ("#2a3a5e", "#2f5583", "#31739c", "#3a93a0", "#5fb08a", "#a3c06a", "#e6b955", "#ff7b5f")
        )
    },
}
_GROUNDS = {"healthy": Style(bgcolor="#122119")}


_PAPER = Style(bgcolor=PAPER)


@cache
def style_of(name: str) -> Style:
    """The style of `name` on the board; `name+ground` puts it on another background."""
    base, _, ground = name.partition("+")
    return _PAPER + _STYLES[base] + _GROUNDS.get(ground, Style())


def ink_of(name: str) -> Style:
    """The same on whatever is below, for windows."""
    return _STYLES[name.partition("+")[0]]
