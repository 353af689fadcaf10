"""Does guessing pay? Tokens per second with and without it, measured side by side on the same batches.

Now and then one plain step is taken beside a speculative one and its token is thrown away, so that samples
never depend on the measurement. Seconds are of the processor on a CPU, of the clock on a GPU.
"""

from __future__ import annotations

FIRST, EVERY = 4, 12
"""The speculative steps that are measured: after a warm-up, then one in `EVERY`."""
ENOUGH = 3
"""Measurements before a number is given: a single one may have met something for the first time."""
FORGET = 0.9
"""What a measurement counts for, once another one came."""


class BreakEven:
    """Decayed sums over the measured pairs of steps."""

    def __init__(self) -> None:
        self._steps, self._pairs = 0, 0
        self._plain: tuple[int, float] | None = None
        self._tokens = [0.0, 0.0]
        self._seconds = [0.0, 0.0]

    def due(self) -> bool:
        """Whether to measure at this step; asked once per speculative step."""
        self._steps += 1
        return self._steps >= FIRST and (self._steps - FIRST) % EVERY == 0

    def plain(self, tokens: int, seconds: float) -> None:
        """The plain step of a pair, before the speculative one."""
        self._plain = (tokens, seconds)

    def speculated(self, tokens: int, seconds: float) -> None:
        """A speculative step; it counts when it is one of a pair."""
        if self._plain is None:
            return
        for side, (more_tokens, more_seconds) in enumerate(((tokens, seconds), self._plain)):
            self._tokens[side] = FORGET * self._tokens[side] + more_tokens
            self._seconds[side] = FORGET * self._seconds[side] + more_seconds
        self._plain = None
        self._pairs += 1

    def metrics(self) -> dict[str, float]:
        """`spec_tokens_per_second`, `plain_tokens_per_second` inside decode steps and their ratio
        `spec_speedup`; empty before `ENOUGH` measurements."""
        if self._pairs < ENOUGH:
            return {}
        speculative, plain = (
            tokens / seconds for tokens, seconds in zip(self._tokens, self._seconds, strict=True)
        )
        return {
            "spec_tokens_per_second": speculative,
            "plain_tokens_per_second": plain,
            "spec_speedup": speculative / plain,
        }
