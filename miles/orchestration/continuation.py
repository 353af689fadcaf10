"""What a run that goes on will be, decided before torch loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from miles.config import ResolvedConfig, with_changes
from miles.orchestration.stored_config import stored_config
from miles.planning import Plan, collect_facts, make_plan


def plan_continuation(run_dir: Path, sets: Sequence[str] = ()) -> tuple[ResolvedConfig, Plan]:
    """The configuration a run was started with, with changes, and the plan of the attempt to come.

    Raises: RunError when the directory holds no configuration; ConfigError and PlanRefused for the changes.
    """
    resolved = with_changes(stored_config(run_dir), sets)
    return resolved, make_plan(resolved, collect_facts(resolved.config))
