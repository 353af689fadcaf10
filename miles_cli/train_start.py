"""What `miles train` starts from besides a run file: another run, and the dashboard around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from miles.errors import ConfigError, MilesError

if TYPE_CHECKING:
    from miles.config import ResolvedConfig
    from miles.orchestration.lineage import Lineage


def refuse_beside_watch(others: Mapping[str, bool]) -> None:
    """Raises ConfigError for options that --watch would leave without effect, and without a terminal."""
    from miles_cli.train_watch import refuse_without_terminal

    given = [name for name, said in others.items() if said]
    if given:
        why = "the dashboard has the terminal for itself"
        raise ConfigError(MilesError(f"--watch and {given[0]} exclude each other", why=why))
    refuse_without_terminal()


def parent_dir(parent: str | None, profile: str | None, config: Path | None) -> Path | None:
    """The run to start from. Raises RunError when it is not there, ConfigError beside another start."""
    if parent is None:
        return None
    if profile or config:
        why = "the settings come from the parent"
        raise ConfigError(MilesError("--parent excludes --profile and --config", why=why, fix="use --set"))
    from miles_cli.commands.runs import find_run

    return find_run(parent, None)


def lineage_of(resolved: ResolvedConfig, parent: Path | None, asked_by: str) -> Lineage:
    """Who asked for the run, and the run it is a copy of."""
    from miles.orchestration.lineage import Lineage, copied_from

    if parent is None:
        return Lineage(asked_by)
    if resolved.config.cluster.address is not None:
        why = "a submitted job cannot read the other run's directory"
        raise ConfigError(MilesError("--parent and --address exclude each other", why=why))
    return copied_from(parent, resolved, asked_by)
