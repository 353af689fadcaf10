"""Curves reduced to the dot columns of a chart: smallest, largest and mean value of each, NaN kept apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles_cli.dashboard.track import TrackView

SMOOTHING = 0.25
"""Weight of the newest point in the exponential moving average."""


@dataclass(frozen=True)
class Columns:
    """Occupied dot columns `[n]`, ascending, with the finite values in them (NaN where there is none).

    `bad` holds the bits of `track.NAN`, `PLUS_INF` and `MINUS_INF`.
    """

    at: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    bad: np.ndarray


def resample(view: TrackView, first: int, last: int, columns: int) -> Columns:
    """The points of steps `first` to `last` (inclusive) over `columns` dot columns."""
    steps, low, high, mean, bad = view.points()
    begin, end = np.searchsorted(steps, [first, last + 1])
    window = slice(int(begin), int(end))
    at = column_of(steps[window], first, last, columns)
    if not len(at):
        return Columns(at, at.astype(float), at.astype(float), at.astype(float), at.astype(np.uint8))
    starts = np.flatnonzero(np.diff(at, prepend=-1))
    finite = np.isfinite(mean[window])
    count = np.add.reduceat(finite.astype(float), starts)
    total = np.add.reduceat(np.where(finite, mean[window], 0.0), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = total / count
    return Columns(
        at[starts],
        np.fmin.reduceat(low[window], starts),
        np.fmax.reduceat(high[window], starts),
        means,
        np.bitwise_or.reduceat(bad[window], starts),
    )


def column_of(steps: np.ndarray, first: int, last: int, columns: int) -> np.ndarray:
    """Dot column of each step."""
    span = max(1, last - first)
    return ((steps - first) * (columns - 1) / span + 0.5).astype(np.int64)


FEW = 12
"""So few points are shown as they are: an average of three evaluations says nothing."""


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average that steps over NaN."""
    if len(values) < FEW:
        return values
    out = np.empty_like(values)
    average = np.nan
    for i, value in enumerate(values.tolist()):
        if value == value:
            average = value if average != average else average + SMOOTHING * (value - average)
        out[i] = average
    return out


def polyline(at: np.ndarray, values: np.ndarray, broken: np.ndarray, columns: int) -> np.ndarray:
    """`values` interpolated to every dot column `[columns]`; NaN outside, and around a `broken` point."""
    line = np.full(columns, np.nan)
    usable = np.isfinite(values) & ~broken
    edges = np.flatnonzero(np.diff(np.concatenate([[False], usable, [False]]).astype(int)))
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        inside = np.arange(at[begin], at[end - 1] + 1)
        line[inside] = np.interp(inside, at[begin:end], values[begin:end])
    return line
