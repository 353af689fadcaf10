"""Versions that this build accepts, read from `versions.toml`, and how versions compare."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_TABLE = tomllib.loads(Path(__file__).with_name("versions.toml").read_text(encoding="utf-8"))

ROUTES_SINCE: str = _TABLE["sglang"]["routes_since"]
"""The oldest SGLang whose servers return routed experts."""

PACKED_UPDATES_SINCE: str = _TABLE["sglang"]["packed_updates_since"]
"""The oldest SGLang whose servers take packed INT4 experts again."""

SGLANG_PINS: Mapping[str, Mapping[str, str]] = _TABLE["sglang"]["pins"]
"""Exact versions that a release of SGLang was built for."""


@dataclass(frozen=True)
class Requirement:
    """A package that a part of a run needs, as `kind.name`, in versions that `accepts` describes."""

    package: str
    by: str
    accepts: str
    why: str


REQUIREMENTS: tuple[Requirement, ...] = tuple(
    Requirement(package, **row) for package, row in _TABLE["requires"].items()
)


def older(version: str, than: str) -> bool:
    """Whether a version comes before another, by their numbers."""
    return _numbers(version) < _numbers(than)


def satisfies(version: str, accepts: str) -> bool:
    """Whether a version is within `==1.2`, `>=1.2` or `>=1.2,<3`."""
    return all(_clause(version, clause.strip()) for clause in accepts.split(","))


def _clause(version: str, clause: str) -> bool:
    match = re.fullmatch(r"(==|>=|<)(.+)", clause)
    assert match, f"versions.toml: {clause!r}"
    mine, theirs = _numbers(version), _numbers(match[2])
    return {"==": mine == theirs, ">=": mine >= theirs, "<": mine < theirs}[match[1]]


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` is (2, 13); zeros at the end make no difference."""
    numbers = [
        int(word) for word in re.findall(r"\d+", version.partition("+")[0].split("rc")[0].split(".post")[0])
    ]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
