"""Whole numbers after "Answer:" (`--rm-type dapo`): how DAPO judges its 17,000 competition problems.

Source: DAPO (arXiv 2503.14476): labels are whole numbers, and the prompt asks for a last line "Answer: …".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from miles.data.sample import Sample
from miles.rewards.boxed import last_boxed
from miles.rewards.outcome import Outcome, RewardFailure

TAIL = 300
"""Characters at the end of a response that are looked at."""
_ANSWER = re.compile(r"(?i)answer\s*:\s*([^\n]+)")
_DRESSING = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}|\\[!,;: ]|\\\(|\\\)|[$*\s,{}]|\^\\circ|\.$"
)


async def answer_line(samples: Sequence[Sample]) -> list[Outcome]:
    """`{"score", "acc", "pred"}`: score 1 or -1, acc 1 or 0, the answer that was found (`--reward-key`)."""
    return [_judge(sample) for sample in samples]


def _judge(sample: Sample) -> Outcome:
    wanted = whole_number(sample.label or "")
    if wanted is None:
        return RewardFailure("bad_label", f"the label {sample.label!r} is no whole number")
    lines = _ANSWER.findall(sample.response[-TAIL:])
    found = lines[-1].strip() if lines else ""
    right = whole_number(found) == wanted
    return {"score": 1.0 if right else -1.0, "acc": float(right), "pred": found}


def whole_number(text: str) -> int | None:
    """The number that a text is, without LaTeX around it and what stands before an equals sign; None for any
    other text, and for a number with a fraction.
    """
    inner = last_boxed(text)
    bare = _DRESSING.sub(r"\1", (text if inner is None else inner).split("=")[-1]).strip()
    try:
        number = Decimal(bare)
    except InvalidOperation:
        return None
    return int(number) if number.is_finite() and number == int(number) else None
