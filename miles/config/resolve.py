"""From profile, run file and flags to one frozen RunConfig.

Order: defaults < extended profiles, left to right < the profile < the run file (with what it extends)
< flags < `--set`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

from miles.config.assignments import Assignment, merge, nested
from miles.config.derive import resolve_all
from miles.config.flags import parse_sets
from miles.config.origin import OriginKind
from miles.config.profiles import Chain, read_chain
from miles.config.resolved import ResolvedConfig
from miles.config.sections import RunConfig
from miles.config.validation import validate
from miles.errors import ConfigError, MilesError


def resolve(
    profile: str | None = None,
    run_file: Path | None = None,
    flags: Sequence[Assignment] = (),
    sets: Sequence[str] = (),
    run_text: str | None = None,
    named_by: str = "",
) -> ResolvedConfig:
    """Layer all sources, check every value and every pair that contradicts itself, and derive what follows.

    Args:
        profile: a shipped profile's name, or the path of a TOML file.
        run_file: the user's run file; same format as a profile.
        flags: what `parse_flags` returned.
        sets: the texts of `--set section.name=value`.
        run_text: what the run file is going to hold, where it is not written yet.
        named_by: the flag that named the profile, for messages.

    Raises:
        ConfigError: with every problem of every source, each with its place.
    """
    chains = [read_chain(profile, OriginKind.PROFILE, at=named_by)] if profile else []
    chains += [read_chain(run_file, OriginKind.RUN_FILE, run_text)] if run_file else []
    problems = [problem for chain in chains for problem in chain.problems]
    typed, set_problems = _try_sets(sets)
    problems += set_problems
    merged = merge([*(layer for chain in chains for layer in chain.assignments), flags, typed])
    resolved = _assemble(merged, profile)
    problems += validate(resolved, ignore=_suspects(chains))
    if problems:
        raise ConfigError(*problems)
    return resolve_all(resolved)


def with_changes(resolved: ResolvedConfig, sets: Sequence[str]) -> ResolvedConfig:
    """The same run file with `--set` changes on top; what was derived is derived anew.

    Raises:
        ConfigError: with every problem of the changes.
    """
    written = [
        Assignment(dotted, resolved.value(dotted), origin)
        for dotted, origin in resolved.origins.items()
        if origin.is_explicit
    ]
    changed = _assemble(merge([written, parse_sets(sets)]), resolved.profile)
    problems = validate(changed)
    if problems:
        raise ConfigError(*problems)
    return resolve_all(changed)


def _assemble(merged: dict[str, Assignment], profile: str | None) -> ResolvedConfig:
    config = RunConfig.model_validate(nested({dotted: item.value for dotted, item in merged.items()}))
    origins = {dotted: item.origin for dotted, item in merged.items()}
    return ResolvedConfig(config, MappingProxyType(origins), profile)


def _try_sets(sets: Iterable[str]) -> tuple[list[Assignment], tuple[MilesError, ...]]:
    try:
        return parse_sets(sets), ()
    except ConfigError as error:
        return [], error.problems


def _suspects(chains: Iterable[Chain]) -> frozenset[str]:
    return frozenset().union(*(chain.suspects for chain in chains))
