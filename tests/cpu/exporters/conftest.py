"""A small recorded run with everything an exporter may stumble over."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from miles.record import History, RecordWriter, RunLayout, RunStatus, summarise, write_summary
from miles.record.json_file import write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Six steps, of which the last three were done twice, a NaN, an evaluation at step 6, an alert."""
    root = tmp_path / "sort-1"
    history = History()
    with RecordWriter(root, history=history) as first:
        first.event("run_start", profile="quickstart")
        for step in range(1, 7):
            with first.phase("rollout", step):
                pass
            first.metrics(step, {"rollout/raw_reward": -1.0 if step > 3 else step / 10, "train/loss": 0.5})
    with RecordWriter(root, attempt=2, history=history) as second:
        second.resume(3)
        for step in range(4, 7):
            loss = math.nan if step == 5 else 0.25
            second.metrics(step, {"rollout/raw_reward": step / 10, "train/loss": loss})
        second.metrics(6, {"eval/sort": 0.75})
        second.alert(rule="NU1", severity="critical", title="a NaN", step=5)
        second.event("run_end", status="finished")
    layout = RunLayout(root)
    write_json(layout.config_json, {"values": {"optimizer": {"lr": 4e-4}, "record": {}}, "origins": {}})
    write_json(layout.meta, {"id": "sort-1"})
    write_summary(root, summarise(history, RunStatus.FINISHED, 1.0, "0" * 12))
    return root
