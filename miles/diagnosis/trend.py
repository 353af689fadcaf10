"""How a noisy reward moved: level at the start, at its best and now, and what of that is more than noise."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise

from miles.diagnosis.thresholds import Thresholds
from miles.record import Series

NOISE_STEPS = 50
_MAD_TO_STD = 1.4826
GAIN_ERRORS = 3.0
"""A level differs from another when they are this many standard errors apart."""


@dataclass(frozen=True)
class RewardTrend:
    """Levels are means over `thresholds.mean_steps` steps."""

    num_steps: int
    first: float
    last: float
    peak: float
    peak_step: int
    """The last step of the best window."""
    error: float
    """Standard error of the difference of two levels."""

    @classmethod
    def of(cls, series: Series, thresholds: Thresholds) -> RewardTrend | None:
        """None before two windows are filled, or when a value is not finite."""
        width = thresholds.mean_steps
        values = series.values[-thresholds.collapse_window :]
        steps = series.steps[-thresholds.collapse_window :]
        if len(values) < 2 * width - 2 or not math.isfinite(total := sum(values[:width])):
            return None
        peak, peak_step = total, steps[width - 1]
        for i in range(width, len(values)):
            total += values[i] - values[i - width]
            if total > peak:
                peak, peak_step = total, steps[i]
        if not math.isfinite(total):
            return None
        return cls(
            num_steps=len(series),
            first=statistics.fmean(series.values[:width]),
            last=statistics.fmean(values[-width:]),
            peak=peak / width,
            peak_step=peak_step,
            error=_step_noise(list(values[-NOISE_STEPS:])) * math.sqrt(2 / width),
        )

    @property
    def has_gained(self) -> bool:
        """Above where it started, by more than noise."""
        return self.last - self.first > GAIN_ERRORS * self.error

    @property
    def has_fallen(self) -> bool:
        """Clearly below its best level, though not yet collapsed."""
        return self.peak - self.last > max(0.15 * abs(self.peak), GAIN_ERRORS * self.error)

    def is_stuck(self, thresholds: Thresholds) -> bool:
        """Long enough at it, and either no better than at the start or falling."""
        return self.num_steps >= thresholds.no_gain_steps and (not self.has_gained or self.has_fallen)

    def has_collapsed(self, thresholds: Thresholds) -> bool:
        lost = self.peak - self.last
        return self.num_steps >= thresholds.collapse_min_steps and lost > max(
            thresholds.collapse_drop * abs(self.peak), thresholds.collapse_noise * self.error
        )


def _step_noise(values: list[float]) -> float:
    """Standard deviation of a step around the trend, from the median absolute step-to-step difference."""
    differences = [abs(b - a) for a, b in pairwise(values)]
    return _MAD_TO_STD * statistics.median(differences) / math.sqrt(2)
