"""What a run directory is called, and what becomes of a run whose kept configuration is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config import resolve, to_json
from miles.errors import CheckpointError, RunError
from miles.orchestration.checkpoints import CheckpointStore
from miles.orchestration.job import new_run_dir
from miles.orchestration.stored_config import stored_config


def named(name: str, runs: Path) -> Path:
    return new_run_dir(resolve("quickstart", sets=[f'run.name="{name}"', f'run.runs_dir="{runs}"']))


def test_a_name_with_dots_is_kept_whole(tmp_path: Path) -> None:
    assert named("qwen3-0.6b", tmp_path).name.startswith("qwen3-0.6b-20")
    unnamed = new_run_dir(resolve("quickstart", sets=[f'run.runs_dir="{tmp_path}"']))
    assert unnamed.name.startswith("quickstart-20")


def test_names_that_no_directory_can_have_are_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        named("n" * 300, tmp_path)
    assert error.value.fix == "give a shorter --run-name"
    with pytest.raises(RunError, match="without a /") as error:
        named("mine/first", tmp_path)
    assert error.value.fix.startswith("--run-name first")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_configuration_is_a_message_with_a_way_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no config"):
        stored_config(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(to_json(resolve("quickstart")))
    assert stored_config(tmp_path).profile == "quickstart"
    for text in ("garbage", "{}", '{"origins": {}, "values": {"optimizer": {"lr": "x"}}, "profile": null}'):
        config.write_text(text)
        with pytest.raises(RunError, match="damaged") as error:
            stored_config(tmp_path)
        assert f"miles train --config {tmp_path}/config.toml" in error.value.fix


def test_a_step_that_was_not_kept_names_one_that_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (tmp_path / "step-000020").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint of step 7") as error:
        store.at_step(7)
    assert (error.value.why, error.value.fix) == ("kept: 20", "name one of those, as --from-step 20")
    with pytest.raises(CheckpointError, match="missing") as error:
        store.load_state(store.at_step(20))
    assert "--from-step N" in error.value.fix
