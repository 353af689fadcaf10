"""One stopwatch for both systems: wall and processor seconds of every step and of its rollout.

Standard library only: it is imported by two interpreters. Processor seconds are those of all threads of the
process; on a shared machine they say what a step costs, wall seconds what it took that day.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Span:
    """Seconds on the clock and on the processor."""

    wall: float
    cpu: float

    def __sub__(self, other: Span) -> Span:
        return Span(self.wall - other.wall, self.cpu - other.cpu)

    @staticmethod
    def now() -> Span:
        return Span(time.perf_counter(), time.process_time())


@dataclass(frozen=True)
class Step:
    """One step: everything from the end of the step before it to its own end."""

    whole: Span
    rollout: Span
    """From prompts to rewards; the rest of the step is training, bookkeeping included."""
    reward: float
    response_tokens: int


@dataclass
class Stopwatch:
    """`spawned` is when the parent started this process, in seconds since the epoch."""

    spawned: float
    startup: Span | None = None
    steps: list[Step] = field(default_factory=list)
    _begin: Span | None = None
    _rollout: Span = Span(0.0, 0.0)

    def start(self) -> None:
        """The first step begins; what came before was start-up. Later calls do nothing."""
        if self._begin is None:
            self.startup = Span(time.time() - self.spawned, time.process_time())
            self._begin = Span.now()

    @contextmanager
    def rollout(self) -> Iterator[None]:
        begin = Span.now()
        yield
        spent = Span.now() - begin
        self._rollout = Span(self._rollout.wall + spent.wall, self._rollout.cpu + spent.cpu)

    def end_step(self, reward: float, response_tokens: int) -> None:
        assert self._begin is not None, "a step ended before the first began"
        now = Span.now()
        self.steps.append(Step(now - self._begin, self._rollout, reward, response_tokens))
        self._begin, self._rollout = now, Span(0.0, 0.0)

    def result(self, versions: dict[str, str]) -> dict[str, Any]:
        """What a side prints: plain data. `peak_rss_mb` is this process's own."""
        assert self.startup is not None and self.steps, "nothing was measured"
        return {
            "startup": asdict(self.startup),
            "steps": [asdict(step) for step in self.steps],
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "versions": versions,
        }
