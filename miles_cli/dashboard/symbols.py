"""The symbol ladder: braille, quadrant blocks, plain ASCII, chosen by what the terminal can show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles.environment import get

_BRAILLE_WEIGHTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLOCK_WEIGHTS = ((1, 2), (4, 8))
_ASCII_WEIGHTS = ((1,), (2,))
_BLOCKS = " ▘▝▀▖▌▞▛▗▚▐▜▄▙▟█"


@dataclass(frozen=True)
class Symbols:
    """Every glyph the dashboard draws. `weights[y][x]` is the bit of one dot inside a character cell."""

    name: str
    weights: tuple[tuple[int, ...], ...]
    line: str
    """Glyph of each dot pattern, for a curve."""
    band: str
    """The same for the range between smallest and largest value, which must look lighter."""
    frame: str
    """Corners clockwise from top left, then horizontal and vertical."""
    frame_focused: str
    dot: str
    up: str
    down: str
    flat: str
    now: str
    """The phase that is going on."""
    critical: str
    warning: str
    info: str
    cleared: str
    good: str
    bad: str
    nan: str
    plus_inf: str
    minus_inf: str
    clipped: str
    """Above the scale."""
    edge: str
    """Drawn along a bound of the healthy range."""
    axis: str
    axis_healthy: str
    """The axis beside values inside the healthy range."""
    base: str
    """The axis under the curves."""
    resumed: str
    cursor: str
    paused: str
    heat: str
    """From low to high; the first is a blank."""
    fills: str
    """Fill of neighbouring phases in the phase bar."""
    bar: str
    track: str
    runs: str
    """One glyph per run."""
    ellipsis: str
    between: str
    """Separator between fields."""

    @property
    def dots_x(self) -> int:
        return len(self.weights[0])

    @property
    def dots_y(self) -> int:
        return len(self.weights)

    def severity(self, severity: str) -> str:
        return {"critical": self.critical, "warning": self.warning}.get(severity, self.info)

    def plain(self, text: str) -> str:
        """Our own typography in the characters of this ladder step."""
        return text if self.name != "ascii" else text.replace("–", "-").replace("≤", "<=").replace("≥", ">=")

    def encode(self, dots: np.ndarray) -> np.ndarray:
        """Dot pattern of each cell, `[rows, columns]`, from bool dots `[rows * dots_y, columns * dots_x]`."""
        rows, columns = dots.shape[0] // self.dots_y, dots.shape[1] // self.dots_x
        cells = dots.reshape(rows, self.dots_y, columns, self.dots_x)
        return np.einsum("ryxd,yd->rx", cells.astype(np.int64), np.array(self.weights))


_ROUND, _HEAVY, _PLAIN, _PLAIN_FOCUSED = "╭╮╯╰─│", "┏┓┛┗━┃", "++++-|", "####=#"

BRAILLE = Symbols(
    name="braille",
    weights=_BRAILLE_WEIGHTS,
    line="".join(chr(0x2800 + code) for code in range(256)),
    band="".join(chr(0x2800 + code) for code in range(256)),
    frame=_ROUND,
    frame_focused=_HEAVY,
    dot="●",
    up="▲",
    down="▼",
    flat="≈",
    now="▸",
    critical="◆",
    warning="▲",
    info="•",
    cleared="◇",
    good="✓",
    bad="✗",
    nan="×",
    plus_inf="▲",
    minus_inf="▼",
    clipped="↑",
    edge="╌",
    axis="│",
    axis_healthy="┃",
    base="─",
    resumed="↻",
    cursor="│",
    paused="❚❚",
    heat=" ░▒▓█",
    fills="█▓▒░",
    bar="█",
    track="░",
    runs="●◆■▲○◇□△",
    ellipsis="…",
    between=" · ",
)

BLOCK = Symbols(
    **{
        **BRAILLE.__dict__,
        "name": "block",
        "weights": _BLOCK_WEIGHTS,
        "line": _BLOCKS,
        "band": " " + "░" * 15,
        "good": "√",
        "bad": "x",
        "edge": "-",
        "resumed": "r",
        "paused": "||",
        "frame": "┌┐┘└─│",
    }
)
"""For terminals whose font has block elements but no braille (the Linux console)."""

ASCII = Symbols(
    name="ascii",
    weights=_ASCII_WEIGHTS,
    line=" '.|",
    band=" :::",
    frame=_PLAIN,
    frame_focused=_PLAIN_FOCUSED,
    dot="*",
    up="^",
    down="v",
    flat="~",
    now=">",
    critical="!",
    warning="^",
    info="-",
    cleared="o",
    good="ok",
    bad="x",
    nan="x",
    plus_inf="^",
    minus_inf="v",
    clipped="^",
    edge="-",
    axis="|",
    axis_healthy="#",
    base="-",
    resumed="r",
    cursor="|",
    paused="||",
    heat=" .:*#",
    fills="#=+-",
    bar="#",
    track=".",
    runs="*#@+oxsd",
    ellipsis="..",
    between=" - ",
)

LADDER = {symbols.name: symbols for symbols in (BRAILLE, BLOCK, ASCII)}


def choose_symbols(name: str | None = None) -> Symbols:
    """The symbols asked for by name, else the richest that locale and TERM can show."""
    if name is not None:
        return LADDER[name]
    locale = get("LC_ALL") or get("LC_CTYPE") or get("LANG") or ""
    if "utf" not in locale.lower():
        return ASCII
    return BLOCK if get("TERM") in ("linux", "vt100", "vt220") else BRAILLE
