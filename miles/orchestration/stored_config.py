"""The configuration that a run directory keeps."""

from __future__ import annotations

from pathlib import Path

from miles.config import ResolvedConfig, from_json
from miles.errors import RunError
from miles.record import RunLayout


def stored_config(run_dir: Path) -> ResolvedConfig:
    """What the run was told, with origins. Raises RunError when the file is not there or is damaged."""
    layout = RunLayout(run_dir)
    if not layout.config_json.is_file():
        raise RunError(
            "the run directory holds no config.json",
            where=str(run_dir),
            why="the run ended before it began, or the file was taken away",
            fix="start it again with miles train",
        )
    try:
        return from_json(layout.config_json.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            "the configuration of the run is damaged",
            where=str(layout.config_json),
            why=str(error).splitlines()[0],
            fix=f"start it anew from its text: miles train --config {layout.config_toml}",
        ) from error
