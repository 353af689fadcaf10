"""One metric in bounded memory: recent points exactly, older ones as min/max buckets.

When the exact part is full its older half is folded into buckets; when there are too many buckets, neighbours
are merged and a bucket covers twice as many steps. A spike or a NaN therefore survives any length of run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EXACT = 16_384
"""Points kept exactly once folding has begun; twice as many before it."""
BUCKETS = 2_048

NAN, PLUS_INF, MINUS_INF = 1, 2, 4


@dataclass(frozen=True)
class TrackView:
    """What a track held at one moment. The arrays are never written to again, so any thread may read them.

    steps, values: int64 and float64 `[n]`, exact, ascending by step.
    old_*: one entry per bucket `[b]`, all before `steps[0]`: its last step, smallest, largest and mean finite
    value (NaN when it has none), and a bit set of the non-finite values met in it.
    """

    steps: np.ndarray
    values: np.ndarray
    old_steps: np.ndarray
    old_low: np.ndarray
    old_high: np.ndarray
    old_mean: np.ndarray
    old_bad: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])

    @property
    def last_step(self) -> int:
        return int(self.steps[-1])

    @property
    def first_step(self) -> int:
        return int(self.old_steps[0] if len(self.old_steps) else self.steps[0])

    def at(self, step: int) -> float | None:
        """The last value said at or before `step`; a bucket answers with its mean. None before the first."""
        i = int(np.searchsorted(self.steps, step, side="right")) - 1
        if i >= 0:
            return float(self.values[i])
        j = int(np.searchsorted(self.old_steps, step, side="left"))
        return float(self.old_mean[j]) if j < len(self.old_steps) and step >= self.first_step else None

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Everything as (step, low, high, mean, bad), buckets first, one entry per bucket or exact point."""
        finite = np.isfinite(self.values)
        exact = self.values if finite.all() else np.where(finite, self.values, np.nan)
        bad = np.zeros(len(exact), np.uint8) if exact is self.values else bad_bits(self.values)
        if not len(self.old_steps):
            return self.steps, exact, exact, exact, bad
        return (
            np.concatenate([self.old_steps, self.steps]),
            np.concatenate([self.old_low, exact]),
            np.concatenate([self.old_high, exact]),
            np.concatenate([self.old_mean, exact]),
            np.concatenate([self.old_bad, bad]),
        )


def bad_bits(values: np.ndarray) -> np.ndarray:
    """NAN, PLUS_INF or MINUS_INF per value, 0 where it is finite."""
    return (np.isnan(values) * NAN + np.isposinf(values) * PLUS_INF + np.isneginf(values) * MINUS_INF).astype(
        np.uint8
    )


class Track:
    """A growing metric. Appending never changes what an earlier `view()` shows."""

    def __init__(self, exact: int = EXACT, buckets: int = BUCKETS) -> None:
        self._exact, self._buckets = exact, buckets
        self._capacity = 256
        self._steps = np.empty(self._capacity, np.int64)
        self._values = np.empty(self._capacity)
        self._n = 0
        self._old: list[np.ndarray] = [
            np.empty(0, np.int64),
            np.empty(0),
            np.empty(0),
            np.empty(0),
            np.empty(0, np.uint8),
        ]
        self._weights = np.empty(0)
        """Finite points in each bucket, so that merged means stay means."""
        self._width = 1
        """Points per bucket."""

    @property
    def last_step(self) -> int | None:
        return int(self._steps[self._n - 1]) if self._n else None

    def extend(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Append points; `steps` ascend and lie after all steps before."""
        position = 0
        while position < len(steps):
            take = min(len(steps) - position, 2 * self._exact - self._n)
            self._append(steps[position : position + take], values[position : position + take])
            position += take
            if self._n == 2 * self._exact:
                self._fold()

    def truncate(self, after_step: int) -> None:
        """Leave out everything after `after_step`: the run was resumed from there."""
        keep = int(np.searchsorted(self._steps[: self._n], after_step, side="right"))
        self._replace(self._steps[:keep], self._values[:keep])
        buckets = int(np.searchsorted(self._old[0], after_step, side="right"))
        self._old = [column[:buckets] for column in self._old]
        self._weights = self._weights[:buckets]

    def view(self) -> TrackView:
        return TrackView(self._steps[: self._n], self._values[: self._n], *self._old)

    def _append(self, steps: np.ndarray, values: np.ndarray) -> None:
        end = self._n + len(steps)
        if end > self._capacity:
            self._capacity = min(max(2 * self._capacity, end), 2 * self._exact)
            self._replace(self._steps[: self._n], self._values[: self._n])
        self._steps[self._n : end] = steps
        self._values[self._n : end] = values
        self._n = end

    def _replace(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Move to new buffers; views keep the old ones."""
        self._capacity = max(self._capacity, 2 * len(steps), 256)
        fresh_steps, fresh_values = np.empty(self._capacity, np.int64), np.empty(self._capacity)
        fresh_steps[: len(steps)], fresh_values[: len(values)] = steps, values
        self._steps, self._values, self._n = fresh_steps, fresh_values, len(steps)

    def _fold(self) -> None:
        values = self._values[: self._exact]
        finite = np.where(np.isfinite(values), values, np.nan)
        columns = [self._steps[: self._exact], finite, finite, finite, bad_bits(values)]
        folded, weights = _group(columns, np.isfinite(values).astype(float), self._width)
        self._old = [np.concatenate(pair) for pair in zip(self._old, folded, strict=True)]
        self._weights = np.concatenate([self._weights, weights])
        self._replace(self._steps[self._exact : self._n], self._values[self._exact : self._n])
        while len(self._weights) > self._buckets and self._width < self._exact:
            self._old, self._weights = _group(self._old, self._weights, 2)
            self._width *= 2


def _group(columns: list[np.ndarray], weights: np.ndarray, size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Merge every `size` neighbours of (step, low, high, mean, bad); a shorter rest stays as it is."""
    whole = len(weights) // size * size
    steps, low, high, mean, bad = (column[:whole].reshape(-1, size) for column in columns)
    weight = weights[:whole].reshape(-1, size)
    total = weight.sum(axis=1)
    sums = np.where(weight > 0, mean * weight, 0.0).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        merged = [
            steps[:, -1],
            np.fmin.reduce(low, axis=1),
            np.fmax.reduce(high, axis=1),
            sums / total,
            np.bitwise_or.reduce(bad, axis=1),
        ]
    rest = [column[whole:] for column in columns]
    return [np.concatenate(pair) for pair in zip(merged, rest, strict=True)], np.concatenate(
        [total, weights[whole:]]
    )
