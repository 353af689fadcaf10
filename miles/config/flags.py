"""The command line of a run, in the spelling of slime and miles: `--lr 5e-7 --colocate --rollout-stop a b`.

Switches take no value and have a negation (`--no-colocate`); lists take every word up to the next flag;
tables are JSON; `--flag=value` works for all. Of a flag given twice the last one counts, as in every launch
script. All mistakes of a line are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from miles.config.assignments import UNSET, Assignment, check
from miles.config.fields import FieldInfo, Kind
from miles.config.lookup import closest_flag, closest_key, find_flag, find_key
from miles.config.origin import Origin, OriginKind
from miles.config.shipped import shipped_names
from miles.config.suggest import did_you_mean
from miles.config.text_values import from_set, from_words
from miles.errors import ConfigError, MilesError

_LISTS = (Kind.STRINGS, Kind.INTEGERS)


def parse_flags(argv: Iterable[str]) -> list[Assignment]:
    """The settings of a command line, in its order.

    Raises:
        ConfigError: with every unknown flag, stray word and unreadable value of the line.
    """
    parser = _Parser(list(argv))
    assignments = parser.parse()
    problems = [*parser.problems, *check(assignments).values()]
    if problems:
        raise ConfigError(*problems)
    return assignments


def parse_sets(sets: Iterable[str]) -> list[Assignment]:
    """The settings of repeated `--set section.name=value`; the word `default` undoes what a profile says.

    Raises:
        ConfigError: with every unknown key and unreadable value.
    """
    assignments: list[Assignment] = []
    problems: list[MilesError] = []
    for text in sets:
        parsed = _parse_set(text)
        if isinstance(parsed, MilesError):
            problems.append(parsed)
        else:
            assignments.append(parsed)
    problems += check(assignments).values()
    if problems:
        raise ConfigError(*problems)
    return assignments


def _parse_set(text: str) -> Assignment | MilesError:
    dotted, equals, value = (part.strip() for part in text.partition("="))
    where = f"--set {text}"
    if not equals:
        return MilesError("no value", where=where, fix="write --set section.name=value")
    field = find_key(dotted)
    if field is None:
        return MilesError(f"unknown key {dotted}", where=where, fix=did_you_mean(closest_key(dotted)))
    origin = Origin(OriginKind.FLAG, f"--set {dotted}")
    if value == "default":
        return Assignment(dotted, UNSET, origin)
    try:
        return Assignment(dotted, from_set(field, value), origin)
    except ValueError as error:
        return MilesError(f"{dotted} must be {error}; it is {value!r}", where=where)


class _Parser:
    """One pass over the words of a command line."""

    def __init__(self, words: list[str]) -> None:
        self.words = words
        self.at = 0
        self.problems: list[MilesError] = []

    def parse(self) -> list[Assignment]:
        assignments = []
        while self.at < len(self.words):
            flag, equals, inline = self.words[self.at].partition("=")
            self.at += 1
            if not flag.startswith("--"):
                self._stray(self.words[self.at - 1])
            elif assignment := self._flag(flag, inline if equals else None):
                assignments.append(assignment)
        return assignments

    def _flag(self, flag: str, inline: str | None) -> Assignment | None:
        found = find_flag(flag)
        if found is None:
            near = closest_flag(flag)
            fix = did_you_mean(near, "`miles train --list-flags` lists them")
            self.problems.append(MilesError("unknown flag", where=flag, fix=fix))
            self._take_words()
            return None
        field, switch = found
        if field.kind is Kind.BOOL and inline is None:
            return self._assignment(field, flag, switch)
        words = [inline] if inline is not None else self._values(field)
        return self._parsed(field, flag, switch, words)

    def _parsed(self, field: FieldInfo, flag: str, switch: bool, words: list[str]) -> Assignment | None:
        if not words:
            self.problems.append(MilesError(f"needs a value: {field.kind}", where=flag))
            return None
        try:
            value = from_words(field, words)
        except ValueError as error:
            what = f"{field.dotted} must be {error}; it is {' '.join(words)!r}"
            self.problems.append(MilesError(what, where=flag))
            return None
        return self._assignment(field, flag, value is switch if field.kind is Kind.BOOL else value)

    def _assignment(self, field: FieldInfo, flag: str, value: Any) -> Assignment:
        return Assignment(field.dotted, value, Origin(OriginKind.FLAG, flag))

    def _values(self, field: FieldInfo) -> list[str]:
        return self._take_words() if field.kind in _LISTS else self._take_words(most=1)

    def _take_words(self, most: int | None = None) -> list[str]:
        """The words up to the next flag, at most so many."""
        start = self.at
        while self.at < len(self.words) and not self.words[self.at].startswith("--"):
            if most is not None and self.at - start == most:
                break
            self.at += 1
        return self.words[start : self.at]

    def _stray(self, word: str) -> None:
        before = self.words[self.at - 2] if self.at > 1 else ""
        found = find_flag(before)
        if found and found[0].kind is Kind.BOOL:
            field = found[0]
            fix = f"{before} is a switch: write {field.flag} or {field.negation}, without a value"
        elif word in shipped_names():
            fix = f"a profile has a flag before it: --profile {word}"
        elif word.endswith(".toml"):
            fix = f"a run file has a flag before it: --config {word}"
        else:
            fix = "every value has a flag before it; `miles train --list-flags` lists them"
        self.problems.append(MilesError(f"unexpected word {word!r}", where=before, fix=fix))
