"""One TOML file as assignments: unknown keys are reported with their line and what was meant."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles.config.assignments import Assignment, check
from miles.config.fields import section_types
from miles.config.lookup import closest_key, closest_section, find_key
from miles.config.origin import Origin, OriginKind
from miles.config.positions import key_lines
from miles.config.suggest import did_you_mean
from miles.errors import MilesError


@dataclass(frozen=True)
class ConfigFile:
    """A profile or run file as written; `problems` holds every mistake in it."""

    label: str
    description: str = ""
    extends: tuple[str, ...] = ()
    extends_line: int | None = None
    assignments: tuple[Assignment, ...] = ()
    problems: tuple[MilesError, ...] = ()
    suspects: frozenset[str] = field(default_factory=frozenset)
    """Keys whose value is not known because of a problem: conflicts that name them are not reported."""


class _Reader:
    """Walks one parsed file and keeps what it finds wrong."""

    def __init__(self, label: str, kind: OriginKind, lines: dict[tuple[str, ...], int]) -> None:
        self.label, self.kind, self.lines = label, kind, lines
        self.problems: list[tuple[int, MilesError]] = []
        self.suspects: set[str] = set()

    def origin(self, *path: str) -> Origin:
        found = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        return Origin(self.kind, self.label, found)

    def report(self, what: str, *path: str, fix: str = "") -> None:
        origin = self.origin(*path)
        self.problems.append((origin.line or 0, MilesError(what, where=str(origin), fix=fix)))

    def drop_wrong(self, assignments: Iterable[Assignment]) -> tuple[Assignment, ...]:
        """The assignments whose type is right; the others become problems."""
        written = {item.dotted: item for item in assignments}
        wrong = check(written.values())
        self.problems += [(written[dotted].origin.line or 0, problem) for dotted, problem in wrong.items()]
        self.suspects |= wrong.keys()
        return tuple(item for item in written.values() if item.dotted not in wrong)

    def sections(self, content: dict[str, Any]) -> Iterator[Assignment]:
        for name, entries in content.items():
            if name not in section_types():
                self._unknown_section(name, entries)
            elif not isinstance(entries, dict):
                self.report(
                    f"{name} is a section, not a value", name, fix=f"write [{name}] and its keys below it"
                )
            else:
                yield from self._leaves(name, entries)

    def _leaves(self, section: str, entries: dict[str, Any]) -> Iterator[Assignment]:
        for name, value in entries.items():
            dotted = f"{section}.{name}"
            if find_key(dotted):
                yield Assignment(dotted, value, self.origin(section, name))
                continue
            near = closest_key(dotted)
            self.suspects |= {near} if near else set()
            self.report(f"unknown key {dotted}", section, name, fix=did_you_mean(near, _SEE_FLAGS))

    def _unknown_section(self, name: str, entries: Any) -> None:
        if isinstance(entries, dict):
            near = closest_section(name)
            known = ", ".join(section_types())
            fix = did_you_mean(f"[{near}]" if near else None, f"the sections are {known}")
            self.report(f"unknown section [{name}]", name, fix=fix)
        else:
            near = closest_key(name)
            self.suspects |= {near} if near else set()
            self.report(f"unknown key {name}", name, fix=did_you_mean(near, _SEE_FLAGS))


_SEE_FLAGS = "`miles train --list-flags` lists them"


def read_file(path: Path, label: str, kind: OriginKind, text: str | None = None) -> ConfigFile:
    """Read a TOML file, or the text that it is going to have.

    What is wrong inside it is in `problems`; OSError when it cannot be opened.
    """
    try:
        text = path.read_text(encoding="utf-8") if text is None else text
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return ConfigFile(label, problems=(_syntax_problem(label, error),))
    reader = _Reader(label, kind, key_lines(text))
    extends = _extends(reader, content.pop("extends", ()))
    description = content.pop("description", "")
    if not isinstance(description, str):
        reader.report("description must be a string", "description")
        description = ""
    assignments = reader.drop_wrong(reader.sections(content))
    return ConfigFile(
        label,
        description,
        extends,
        reader.lines.get(("extends",)),
        assignments,
        tuple(problem for _, problem in sorted(reader.problems, key=lambda entry: entry[0])),
        frozenset(reader.suspects),
    )


def _extends(reader: _Reader, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return tuple(names)
    reader.report("extends must be a list of profile names", "extends", fix='write extends = ["base/grpo"]')
    return ()


def _syntax_problem(label: str, error: Exception) -> MilesError:
    """`Expected '=' (at line 2, column 12)` as file:line: message."""
    if isinstance(error, UnicodeDecodeError):
        return MilesError(f"not UTF-8 text: {error.reason} at byte {error.start}", where=label)
    message = str(error)
    place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    where = f"{label}:{place[1]}:{place[2]}" if place else label
    return MilesError(f"not valid TOML: {message[: place.start()] if place else message}", where=where)
