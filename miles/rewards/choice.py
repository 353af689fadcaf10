"""Multiple choice (`--rm-type gpqa`): the letter that a response settles on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from miles.data.sample import Sample
from miles.rewards.outcome import Outcome, RewardFailure

MOST_CHOICES = 10
_NAMED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+is)?\s*[:=]?\s*(?:\\boxed\{|\\text\{|[(\[*$\s])*([A-Z])\b(?!')",
    re.IGNORECASE,
)
_ALONE = re.compile(r"\b([A-Z])\b(?!')")


async def choice(samples: Sequence[Sample]) -> list[Outcome]:
    """1.0 when the last choice that the response names is the right one, else 0.0.

    The label is a letter, or the text of one of `metadata["choices"]`. What stands before `</think>` does not
    count. A letter after "answer", "option" or "choice" goes before one that stands alone.
    """
    return [_judge(sample) for sample in samples]


def _judge(sample: Sample) -> Outcome:
    letters = _letters(sample)
    right = _right_letter(sample, letters)
    if right is None:
        return RewardFailure("bad_label", f"the label {sample.label!r} is neither a letter nor a choice")
    return float(chosen_letter(sample.response, letters) == right)


def chosen_letter(response: str, letters: str) -> str | None:
    """The choice that a response settles on; None when it names none."""
    text = response.rpartition("</think>")[2]
    for pattern in (_NAMED, _ALONE):
        found = [letter.upper() for letter in pattern.findall(text)]
        valid = [letter for letter in found if letter in letters]
        if valid:
            return valid[-1]
    return None


def _letters(sample: Sample) -> str:
    choices = sample.metadata.get("choices")
    return ascii_uppercase[: len(choices) if choices else MOST_CHOICES]


def _right_letter(sample: Sample, letters: str) -> str | None:
    label = (sample.label or "").strip()
    if label.upper() in letters and len(label) == 1:
        return label.upper()
    choices = sample.metadata.get("choices") or []
    texts = list(choices.values()) if isinstance(choices, dict) else list(choices)
    same = [index for index, text in enumerate(texts) if _plain(str(text)) == _plain(label)]
    return letters[same[0]] if len(same) == 1 else None


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()
