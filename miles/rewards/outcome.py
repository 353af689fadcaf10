"""What a verifier says of a sample: a reward, or why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from miles.data.sample import Sample

FailureCategory = Literal["no_reward", "non_finite", "bad_label", "timeout", "exception", "unfinished"]


@dataclass(frozen=True)
class RewardFailure:
    """Why a sample has no reward. Never the same as a reward of zero."""

    category: FailureCategory
    text: str


Outcome = float | dict[str, Any] | RewardFailure | None
"""A reward (number, or dict for `reward_key`), a failure, or None: the function gave nothing."""

Verifier = Callable[[Sequence[Sample]], Awaitable[list[Outcome]]]
"""Judges samples, one outcome each, in order."""


@dataclass(frozen=True)
class RewardReport:
    """The outcome of one scoring call, one entry per sample."""

    rewards: list[float | None]
    """The scalar reward, after `reward_key`; None where there is none."""
    failures: list[RewardFailure | None]
    """Why; None where there is a reward."""

    def failure_counts(self) -> dict[str, int]:
        """Samples without a reward by category; a category without samples is absent."""
        return dict(Counter(failure.category for failure in self.failures if failure is not None))

    def failure_texts(self) -> dict[str, str]:
        """The first text of each category."""
        texts: dict[str, str] = {}
        for failure in self.failures:
            if failure is not None:
                texts.setdefault(failure.category, failure.text)
        return texts
