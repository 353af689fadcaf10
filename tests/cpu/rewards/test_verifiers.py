"""Verifiers by name: whole numbers after "Answer:", choices, overlap of words, answers after thinking."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from miles.data.sample import Sample, SampleStatus
from miles.rewards.choice import chosen_letter
from miles.rewards.outcome import RewardFailure
from miles.rewards.registry import built_in_verifier
from miles.rewards.thought import conclusion
from miles.rewards.words import f1


def outcome(rm_type: str, response: str, label: str, **metadata: Any) -> Any:
    sample = Sample("?", response=response, label=label, status=SampleStatus.COMPLETED, metadata=metadata)
    (judged,) = asyncio.run(built_in_verifier(rm_type)([sample]))  # type: ignore[arg-type]
    return judged


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("so\nAnswer: 42", True),
        ("Answer: 41\nno.\nanswer : $\\boxed{42}$", True),
        ("Answer: $x = 1{,}042$", False),
        ("Answer: 42.0", True),
        ("Answer: 42.5", False),
        ("Answer: \\(42\\).", True),
        ("42", False),
        ("Answer: 42" + " " * 300, False),
    ],
)
def test_dapo_reads_the_last_answer_line_of_the_end(response: str, right: bool) -> None:
    judged = outcome("dapo", response, "42")
    assert judged["score"] == (1.0 if right else -1.0)
    assert judged["acc"] == float(right)


def test_dapo_takes_whole_numbers_as_labels() -> None:
    assert outcome("dapo", "Answer: 1,042", "1042")["acc"] == 1
    assert isinstance(outcome("dapo", "Answer: 3", "three"), RewardFailure)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: B", "B"),
        ("A is tempting, but the answer is (C).", "C"),
        ("The answer is A. Wait. The correct answer is $\\boxed{D}$", "D"),
        ("<think>answer: A</think>\nB", "B"),
        ("I'd say C", "C"),
        ("no idea", None),
        ("Answer: Z", None),
    ],
)
def test_the_last_choice_that_is_named_counts(response: str, letter: str | None) -> None:
    assert chosen_letter(response, "ABCD") == letter


def test_a_choice_may_be_labelled_by_its_text() -> None:
    assert outcome("gpqa", "Answer: B", "The  Sun", choices=["the moon", "the sun!"]) == 1.0
    assert outcome("gpqa", "Answer: A", "B") == 0.0
    assert isinstance(outcome("gpqa", "Answer: A", "mars", choices=["moon", "sun"]), RewardFailure)


def test_f1_is_the_overlap_of_words() -> None:
    assert f1("the quick brown fox", "A quick, red fox.") == pytest.approx(2 * 2 / (3 + 3))
    assert f1("fox fox", "fox") == pytest.approx(2 / 3)
    assert f1("yes it is", "yes") == 0.0
    assert f1("yes", "Yes!") == 1.0
    assert f1("cat", "dog") == 0.0


def test_deepscaler_wants_an_end_of_thought() -> None:
    assert conclusion("a</think>b</think>c") == "c"
    assert conclusion("\\boxed{1}") is None
    assert outcome("deepscaler", "\\boxed{1/2}", "0.5") == 0.0


def test_deepscaler_compares_as_mathematics() -> None:
    assert outcome("deepscaler", "\\boxed{3}</think> \\boxed{1/2}", "0.5") == 1.0
