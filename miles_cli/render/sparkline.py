"""A curve in one row of text: the course of a metric beside its number."""

from __future__ import annotations

import numpy as np

from miles_cli.dashboard.resample import resample
from miles_cli.dashboard.symbols import Symbols
from miles_cli.dashboard.track import TrackView


def sparkline(view: TrackView, first: int, last: int, width: int, symbols: Symbols) -> str:
    """`width` characters over the steps `first` to `last`; a NaN or an infinity in a column shows a mark."""
    columns = resample(view, first, last, width * symbols.dots_x)
    dots = np.zeros((symbols.dots_y, width * symbols.dots_x), bool)
    drawn = np.isfinite(columns.mean)
    if drawn.any():
        low, high = columns.mean[drawn].min(), columns.mean[drawn].max()
        share = (columns.mean[drawn] - low) / ((high - low) or 1.0)
        level = np.round((1 - share) * (symbols.dots_y - 1)).astype(int)
        dots[level, columns.at[drawn]] = True
    text = [symbols.line[code] for code in symbols.encode(dots)[0]]
    for at in columns.at[columns.bad > 0]:
        text[at // symbols.dots_x] = symbols.nan
    return "".join(text)
