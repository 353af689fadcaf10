"""Numbers as people read them."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """`1 step`, `80 steps`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def binary_bytes(number: float) -> str:
    """`70.7 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def rate(number: float) -> str:
    """`24.1k`: a number of things per second."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """`0.31 s`, `47 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
