"""Live export: a process beside the run copies what the run writes, and ends with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from miles.errors import Unavailable
from miles.exporters import follow
from miles.exporters.follow import copy_until_end
from miles.exporters.sink import pass_on
from miles.record import History, RecordWriter, RunLayout, RunReader, RunStatus, summarise, write_summary
from miles.record.json_file import write_json


class Heard:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def log(self, step: int, time: float, metrics: Any) -> None:
        self.said.append((step, dict(metrics)))

    def rewind(self, step: int) -> None:
        self.said.append(("rewind", step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.said.append(("closed",))


def configured(root: Path, **record: Any) -> Path:
    layout = RunLayout(root)
    layout.make()
    write_json(layout.config_json, {"values": {"record": record}, "origins": {}})
    return root


def points(directory: Path) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("train/loss")]


def wait_for(files: Path) -> None:
    deadline = time.monotonic() + 300
    while not list(files.glob("*tfevents*")):
        assert time.monotonic() < deadline, "the follower wrote nothing"
        time.sleep(0.05)


def test_two_attempts_of_a_run_reach_tensorboard_as_one_curve(tmp_path: Path) -> None:
    root = configured(tmp_path / "run", use_tensorboard=True, tb_project_name=str(tmp_path / "tb"))
    history = History()
    for attempt, steps in ((1, (1, 2, 3)), (2, (2, 3))):
        with RecordWriter(root, attempt=attempt, history=history) as writer:
            process = follow(root, attempt)
            assert process is not None
            if attempt == 2:
                writer.resume(1)
            for step in steps:
                writer.metrics(step, {"train/loss": float(attempt)})
            wait_for(tmp_path / "tb" / "run")
        write_summary(root, summarise(history, RunStatus.FINISHED, 1.0, "0" * 12))
        assert process.wait(timeout=300) == 0, (root / "logs" / "exporters.log").read_text()
    assert points(tmp_path / "tb" / "run") == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_a_run_that_asks_for_no_exporter_starts_no_process(tmp_path: Path) -> None:
    assert follow(configured(tmp_path / "run", use_tensorboard=False)) is None


def test_a_missing_tracker_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles.exporters.trackers.find_spec", lambda module: None)
    root = configured(tmp_path / "run", use_wandb=True)
    with pytest.raises(Unavailable, match="pip install wandb"):
        follow(root)
    assert not (root / "logs" / "exporters.log").exists()


def test_a_follower_copies_only_its_own_attempt_and_ends_when_another_begins(run: Path) -> None:
    first, second = Heard(), Heard()
    copy_until_end(RunReader(run, read=False), [second], attempt=2)
    # Without its summary the run counts as running: only the second attempt ends the first one's follower.
    (run / "summary.json").unlink()
    copy_until_end(RunReader(run, read=False), [first], attempt=1)
    assert [said[0] for said in second.said] == ["rewind", 4, 5, 6, 6, "closed"]
    assert second.said[0] == ("rewind", 3)
    assert [said[0] for said in first.said][-1] == "closed"
    assert "rewind" not in [said[0] for said in first.said]


def test_other_records_pass_by() -> None:
    heard = Heard()
    pass_on([{"kind": "alert", "step": 1}, {"kind": "phase_start"}], [heard])
    assert heard.said == []
