"""What a person names when they mean a configuration: a profile, a TOML file, or a run."""

from __future__ import annotations

from pathlib import Path

from miles import environment
from miles.config import ResolvedConfig, resolve, shipped_names
from miles.errors import RunError
from miles.orchestration.stored_config import stored_config
from miles.record.runs import is_run, resolve_run


def load_config(reference: str) -> ResolvedConfig:
    """The configuration behind a name, with origins.

    Raises ConfigError for a profile or file that is wrong or not there, RunError for a run without a config.
    """
    path = Path(reference)
    if reference.endswith(".toml") or reference in shipped_names():
        return resolve(reference)
    if path.is_dir() and is_run(path):
        return stored_config(path)
    runs = environment.runs_dir()
    try:
        return stored_config(resolve_run(reference, runs))
    except RunError:
        # Neither a run: the message about profiles names the nearest one.
        return resolve(reference)
