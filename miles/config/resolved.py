"""A resolved run file: the frozen values and, for each, where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from miles.config.origin import DEFAULT, Origin, OriginKind
from miles.config.sections import RunConfig


@dataclass(frozen=True)
class ResolvedConfig:
    """RunConfig with provenance. Nothing changes one; `derive` makes another."""

    config: RunConfig
    origins: Mapping[str, Origin]
    """The origin of every key that is not at its default; see `origin`."""
    profile: str | None = None
    """The profile it was made from, as the user named it."""

    def value(self, dotted: str) -> Any:
        """The value of `section.name`."""
        section, _, name = dotted.partition(".")
        return getattr(getattr(self.config, section), name)

    def origin(self, dotted: str) -> Origin:
        """Where the value of `section.name` came from."""
        return self.origins.get(dotted, DEFAULT)

    def is_explicit(self, dotted: str) -> bool:
        """Whether somebody wrote this value down, in a profile, a run file or a flag."""
        return self.origin(dotted).is_explicit

    def derive(self, dotted: str, value: Any, rule: str) -> ResolvedConfig:
        """A copy with one derived value, and the rule it follows from.

        Explicit values always win, so deriving over one is a defect; ask `is_explicit` first.
        """
        assert not self.is_explicit(dotted), f"{dotted} was set by {self.origin(dotted)}"
        section, _, name = dotted.partition(".")
        values = getattr(self.config, section)
        derived = type(values).model_validate(values.model_dump() | {name: value})
        config = self.config.model_copy(update={section: derived})
        origins = {**self.origins, dotted: Origin(OriginKind.DERIVED, rule)}
        return ResolvedConfig(config, MappingProxyType(origins), self.profile)
