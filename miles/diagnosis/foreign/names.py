"""Which system wrote these metrics, and what we call them."""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from miles.record.metrics import find_metric

_FILE = Path(__file__).with_name("names.toml")
TRANSFORMS: dict[str, Callable[[float], float]] = {
    "log": lambda value: math.log(value) if value > 0 else math.nan,
    "one_minus": lambda value: 1.0 - value,
}


@dataclass(frozen=True)
class Name:
    """One row of the map."""

    pattern: re.Pattern[str]
    ours: str
    transform: Callable[[float], float] | None


@dataclass(frozen=True)
class System:
    """How one system names its metrics."""

    title: str
    signature: frozenset[str]
    zero_is_absent: frozenset[str]
    names: tuple[Name, ...]
    keeps_ours: bool
    """Names that are declared by us mean the same there."""

    def ours(self, name: str) -> tuple[str, Callable[[float], float] | None] | None:
        """Our name and the transform of the value; None for a metric that we do not know."""
        for row in self.names:
            if (match := row.pattern.fullmatch(name)) is not None:
                return row.ours.replace("*", match[1] if match.groups() else ""), row.transform
        return (name, None) if self.keeps_ours and is_known(name) else None


def is_known(name: str) -> bool:
    """Whether a rule can make sense of the name: declared, or read from files of miles and slime."""
    return find_metric(name) is not None or name.startswith(_ALSO_READ)


_ALSO_READ = (
    "train/mis_",
    "train/mtp_loss",
    "rollout/spec_accept",
    "rollout/tito_session_mismatch_rate/",
    "rollout/fully_async/",
    "perf/wait_time_ratio",
    "perf/actor_train_mfu",
    "perf/update_weights_density",
)


@functools.cache
def systems() -> dict[str, System]:
    """The map file, by key."""
    table = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    return {key: _system(key, values) for key, values in table.items()}


def recognise(names: Iterable[str]) -> System | None:
    """The system with the most telltale names among `names`; None when there is no telltale."""
    present = set(names)
    best = max(systems().values(), key=lambda system: len(system.signature & present))
    return best if best.signature & present else None


def _system(key: str, values: dict) -> System:
    return System(
        values["title"],
        frozenset(values["signature"]),
        frozenset(values.get("zero_is_absent", ())),
        tuple(_name(theirs, ours) for theirs, ours in values["names"].items()),
        keeps_ours=key == "miles",
    )


def _name(theirs: str, ours: str | dict[str, str]) -> Name:
    pattern = re.compile(re.escape(theirs).replace(r"\*", "([^/]+)"))
    if isinstance(ours, str):
        return Name(pattern, ours, None)
    return Name(pattern, ours["name"], TRANSFORMS[ours["transform"]])
