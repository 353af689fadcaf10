"""Words of a command line as values."""

from __future__ import annotations

import json
import tomllib
from typing import Any

from miles.config.fields import FieldInfo, Kind


def from_words(field: FieldInfo, words: list[str]) -> Any:
    """The value of a flag's words (one, unless the field is a list); ValueError says what was expected."""
    if field.kind is Kind.STRINGS:
        return tuple(words)
    if field.kind is Kind.INTEGERS:
        return tuple(_number(int, word, "an integer") for word in words)
    return _scalar(field.kind, words[0])


def from_set(field: FieldInfo, text: str) -> Any:
    """The right-hand side of `--set key=value`: a TOML literal, or plain text where the field is a string."""
    if field.kind is Kind.STR and text[:1] not in ('"', "'"):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise ValueError(f"{field.kind}, written as in TOML") from None


def _scalar(kind: Kind, word: str) -> Any:
    if kind is Kind.INT:
        return _number(int, word, "an integer")
    if kind is Kind.FLOAT:
        return _number(float, word, "a number")
    if kind is Kind.BOOL:
        return _boolean(word)
    if kind is Kind.TABLE:
        return _table(word)
    return word


def _number(parse: type[int] | type[float], word: str, expected: str) -> float:
    try:
        return parse(word)
    except ValueError:
        raise ValueError(expected) from None


def _boolean(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return word.lower() == "true"


def _table(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except json.JSONDecodeError as error:
        raise ValueError(f"a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("a JSON object")
    return value
