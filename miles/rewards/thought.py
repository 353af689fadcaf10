"""The `deepscaler` verifier: mathematics in the last \\boxed{} after the thinking ended."""

from __future__ import annotations

from miles.rewards.boxed import boxed, on_part
from miles.rewards.outcome import Verifier

ENDS_OF_THOUGHT = ("</think>", "###Response")


def after_thinking(verifier: Verifier) -> Verifier:
    """`verifier` on the boxed answer after the thinking; 0.0 for a response that never ended to think."""
    return on_part(boxed(verifier), conclusion)


def conclusion(response: str) -> str | None:
    """What follows the last end of thought; None when there is none."""
    for end in ENDS_OF_THOUGHT:
        if end in response:
            return response.rpartition(end)[2]
    return None
