"""Numbers and durations as a person reads them, in few characters."""

from __future__ import annotations

import math

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))
_SCALE = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


def number(value: float) -> str:
    """Three significant digits in at most seven characters: 0.0312, 12.3k, 3.1e-5."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    size = abs(value)
    if size == 0:
        return "0"
    for limit, suffix in _SUFFIXES:
        if size >= limit:
            return f"{_digits(value / _SCALE[suffix])}{suffix}"
    if size >= 1e-3:
        return _digits(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _digits(value: float) -> str:
    if value == round(value) and abs(value) < 1e4:
        return str(round(value))
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(places, 5)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def duration(seconds: float) -> str:
    """31ms, 1.2s, 48s, 3m12s, 5h04m, 2d03h."""
    if 0.00005 <= seconds < 0.0005:
        return f"{1000 * seconds:.1f}ms"
    if 0.0005 <= seconds < 0.0995:
        return f"{1000 * seconds:.0f}ms"
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
