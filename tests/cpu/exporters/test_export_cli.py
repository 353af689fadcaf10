"""`miles export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from miles.errors import ConfigError, RunError
from miles.exporters import FORMATS
from miles_cli.app import build
from miles_cli.commands import export as command


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(build(["export", *arguments]), ["export", *arguments])


def test_the_files_go_to_stdout_and_the_next_step_to_stderr(run: Path) -> None:
    result = invoke(str(run))
    (path,) = map(Path, result.stdout.splitlines())
    assert path.parent == run / "exports" / "tensorboard" / "sort-1" and path.exists()
    assert f"tensorboard --logdir {run / 'exports' / 'tensorboard'}" in result.stderr


def test_json_names_run_format_and_files(run: Path, tmp_path: Path) -> None:
    result = invoke(str(run), "--to", "csv", "--out", str(tmp_path / "csv"), "--json")
    told = json.loads(result.stdout)
    assert (told["run_id"], told["to"]) == ("sort-1", "csv")
    assert [Path(file).name for file in told["files"]] == ["metrics.csv", "events.csv", "phases.csv"]


def test_an_unknown_format_and_an_unknown_run_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of tensorboard"):
        raise invoke(str(run), "--to", "excel").exception  # type: ignore[misc]
    with pytest.raises(RunError):
        raise invoke(str(tmp_path / "nothing")).exception  # type: ignore[misc]


def test_the_command_offers_every_format_there_is() -> None:
    assert set(command.FORMATS) == set(FORMATS)
