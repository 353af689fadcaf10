"""The vertical scale of a chart: which values it spans, where its labels stand, linear or logarithmic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from miles.record.metrics import Band

CLIP_FROM = 60
"""From so many columns on a spike may leave the scale: it must not flatten the rest of the curve."""


@dataclass(frozen=True)
class Scale:
    """Maps values to the unit interval, 0 at the bottom."""

    low: float
    high: float
    log: bool = False

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Positions of `values`, clipped into [0, 1]; NaN stays. On a log scale others are at 0."""
        low, high = self._bounds()
        if self.log:
            values = np.log10(np.where(values > 0, values, self.low))
        return np.clip((values - low) / (high - low), 0.0, 1.0)

    def value(self, unit: float) -> float:
        low, high = self._bounds()
        position = low + unit * (high - low)
        return 10.0**position if self.log else position

    def _bounds(self) -> tuple[float, float]:
        return (float(np.log10(self.low)), float(np.log10(self.high))) if self.log else (self.low, self.high)


def choose_scale(low: np.ndarray, high: np.ndarray, healthy: Band | None, log: bool) -> Scale:
    """A scale for curves between `low` and `high` (NaN allowed), with the healthy bounds that are near."""
    values = np.concatenate([low, high])
    values = values[np.isfinite(values)]
    log = log and bool((values > 0).any())
    if log:
        values = values[values > 0]
    if not len(values):
        return Scale(0.0, 1.0)
    bottom, top = _extent(values)
    if log:
        return (
            Scale(bottom / 1.2, top * 1.2, log=True) if top > bottom else Scale(bottom / 3, top * 3, log=True)
        )
    bottom, top = _include(bottom, top, healthy)
    if top - bottom < 1e-12 * max(1e-300, abs(top)) or top == bottom:
        margin = abs(top) * 0.1 or 1.0
        return Scale(bottom - margin if bottom < 0 or bottom >= margin else 0.0, top + margin)
    if 0 <= bottom < 0.35 * top:
        return Scale(0.0, top + 0.04 * top)
    margin = 0.04 * (top - bottom)
    return Scale(bottom - margin, top + margin)


def _extent(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value; in a long curve without what lies further out than the rest is wide."""
    bottom, top = float(values.min()), float(values.max())
    if len(values) < 2 * CLIP_FROM:
        return bottom, top
    low, high = (float(bound) for bound in np.percentile(values, [1, 99]))
    span = high - low
    return (bottom if bottom >= low - span else low), (top if top <= high + span else high)


def _include(bottom: float, top: float, healthy: Band | None) -> tuple[float, float]:
    """Stretch to a bound of the healthy range that lies within one span, to show the distance."""
    span = (top - bottom) or abs(top) or float("inf")
    for bound in (healthy.low, healthy.high) if healthy else ():
        if bound is not None and bottom - span <= bound <= top + span:
            bottom, top = min(bottom, bound), max(top, bound)
    return bottom, top
