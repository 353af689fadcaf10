"""The `boxed_` prefix of a verifier: judge only what the response put into its last \\boxed{}."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from miles.data.sample import Sample
from miles.rewards.outcome import Outcome, Verifier


def boxed(verifier: Verifier) -> Verifier:
    """`verifier` on the boxed answer; a response without one gets 0.0."""
    return on_part(verifier, last_boxed)


def on_part(verifier: Verifier, part: Callable[[str], str | None]) -> Verifier:
    """`verifier` on what `part` takes of each response; 0.0 where that is None."""

    async def judge(samples: Sequence[Sample]) -> list[Outcome]:
        parts = [part(sample.response) for sample in samples]
        given = [
            replace(sample, response=taken)
            for sample, taken in zip(samples, parts, strict=True)
            if taken is not None
        ]
        outcomes = iter(await verifier(given) if given else [])
        return [0.0 if taken is None else next(outcomes) for taken in parts]

    return judge


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, braces balanced; None when there is none."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        end = _closing_brace(text, start + len(r"\boxed{"))
        if end is not None:
            return text[start + len(r"\boxed{") : end]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for i in range(start, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return i
    return None
