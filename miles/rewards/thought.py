"""The `deepscaler` verifier: mathematics in the last \\boxed{} after the thinking ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from miles.data.sample import Sample
from miles.rewards.boxed import boxed
from miles.rewards.outcome import Outcome, Verifier

ENDS_OF_THOUGHT = ("</think>", "###Response")


def after_thinking(verifier: Verifier) -> Verifier:
    """`verifier` on the boxed answer after the thinking; 0.0 for a response that never ended to think."""
    judge_box = boxed(verifier)

    async def judge(samples: Sequence[Sample]) -> list[Outcome]:
        ends = [conclusion(sample.response) for sample in samples]
        given = [
            replace(sample, response=end)
            for sample, end in zip(samples, ends, strict=True)
            if end is not None
        ]
        outcomes = iter(await judge_box(given) if given else [])
        return [0.0 if end is None else next(outcomes) for end in ends]

    return judge


def conclusion(response: str) -> str | None:
    """What follows the last end of thought; None when there is none."""
    for end in ENDS_OF_THOUGHT:
        if end in response:
            return response.rpartition(end)[2]
    return None
