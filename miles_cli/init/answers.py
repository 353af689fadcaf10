"""Typed words as answers, and answers as flags."""

from __future__ import annotations

from collections.abc import Iterable

from miles.config.suggest import closest, did_you_mean
from miles.config.toml_text import literal
from miles.errors import MilesError
from miles_cli.init.questions import CUSTOM, Kind, Question, Value

_WORDS = {"yes": True, "y": True, "true": True, "no": False, "n": False, "false": False}


def parse(question: Question, text: str, choices: Iterable[str] = ()) -> Value:
    """The answer that a person typed.

    Raises MilesError with the flag as its place when it is none; `choices` are only binding for the reward.
    """
    text = text.strip()
    if text == "" and not question.optional:
        raise _wrong(question, f"{question.title} needs an answer: {question.kind}")
    if question.kind is Kind.SWITCH:
        if text.lower() not in _WORDS:
            raise _wrong(question, f"{text!r} is neither yes nor no")
        return _WORDS[text.lower()]
    if question.kind is Kind.TEXT:
        return _text(question, text, tuple(choices))
    return _number(question, text)


def _text(question: Question, text: str, choices: tuple[str, ...]) -> str:
    if question.id == "rm_type" and choices and text not in choices:
        near = closest(text, choices)
        fix = did_you_mean(near, f"{CUSTOM} takes a function of yours")
        raise _wrong(question, f"{text!r} is none of {', '.join(choices)}", fix)
    if question.id == "rollout_stop_token_ids" and not all(
        part.strip().isdigit() for part in text.split(",") if text
    ):
        raise _wrong(question, f"{text!r} is not a list of token ids", "write them as 151645,151643")
    return text


def _number(question: Question, text: str) -> int | float:
    kind = int if question.kind is Kind.INT else float
    try:
        number = kind(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise _wrong(question, f"{text!r} is not {question.kind}") from None
    if not question.least <= number < float("inf"):
        raise _wrong(question, f"{text} is not {question.kind} of at least {question.least:g}")
    return number


def _wrong(question: Question, what: str, fix: str = "") -> MilesError:
    return MilesError(what, where=question.flag, fix=fix)


def as_text(value: Value) -> str:
    """An answer as a person types it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else literal(value)


def as_words(question: Question, value: Value) -> tuple[str, ...]:
    """An answer as words of a command line."""
    if isinstance(value, bool):
        return (question.flag if value else f"--no-{question.flag.removeprefix('--')}",)
    return (question.flag, as_text(value))
