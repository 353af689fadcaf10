"""What a run that goes on will be, decided before torch loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from miles.config import ResolvedConfig, from_json, with_changes
from miles.errors import RunError
from miles.planning import Plan, collect_facts, make_plan
from miles.record import RunLayout


def plan_continuation(run_dir: Path, sets: Sequence[str] = ()) -> tuple[ResolvedConfig, Plan]:
    """The configuration a run was started with, with changes, and the plan of the attempt to come.

    Raises: RunError when the directory holds no configuration; ConfigError and PlanRefused for the changes.
    """
    path = RunLayout(run_dir).config_json
    if not path.is_file():
        raise RunError(
            "the run directory holds no config.json",
            where=str(run_dir),
            why="the run ended before it began",
            fix="start it again with miles train",
        )
    resolved = with_changes(from_json(path.read_text()), sets)
    return resolved, make_plan(resolved, collect_facts(resolved.config))
