"""Parquet and CSV of a run, read back by others."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from pyarrow import parquet

from miles.exporters import compact, export_run


def test_metrics_have_one_row_per_live_step(run: Path, tmp_path: Path) -> None:
    metrics_path, _, _ = export_run(run, "parquet", tmp_path)
    table = parquet.read_table(metrics_path)
    assert table["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert table["attempt"].to_pylist() == [1, 1, 1, 2, 2, 2]
    assert table["rollout/raw_reward"].to_pylist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    losses = table["train/loss"].to_pylist()
    assert math.isnan(losses[4]) and losses[5] == 0.25


def test_csv_tells_a_nan_from_a_value_that_is_absent(run: Path, tmp_path: Path) -> None:
    metrics_path, _, _ = export_run(run, "csv", tmp_path)
    with metrics_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row["train/loss"] for row in rows] == ["0.5", "0.5", "0.5", "0.25", "nan", "0.25"]
    assert [row["eval/sort"] for row in rows] == ["", "", "", "", "", "0.75"]


def test_a_metric_that_a_step_lacks_is_null_not_zero(run: Path, tmp_path: Path) -> None:
    metrics_path, _, _ = export_run(run, "parquet", tmp_path)
    assert parquet.read_table(metrics_path)["eval/sort"].to_pylist() == [None] * 5 + [0.75]


def test_events_carry_their_fields_as_json(run: Path, tmp_path: Path) -> None:
    _, events_path, _ = export_run(run, "parquet", tmp_path)
    events = {row["kind"]: row for row in parquet.read_table(events_path).to_pylist()}
    assert events["alert"]["step"] == 5
    assert json.loads(events["alert"]["fields"])["rule"] == "NU1"
    assert events["run_end"]["attempt"] == 2


def test_phases_of_abandoned_steps_are_left_out(run: Path, tmp_path: Path) -> None:
    _, _, phases_path = export_run(run, "parquet", tmp_path)
    phases = parquet.read_table(phases_path)
    assert phases["step"].to_pylist() == [1, 2, 3]
    assert all(seconds >= 0 for seconds in phases["seconds"].to_pylist())


def test_compacting_keeps_the_record_and_leaves_no_scratch_file(run: Path) -> None:
    before = (run / "events" / "driver.jsonl").read_bytes()
    written = compact(run)
    assert {path.name for path in (run / "compacted").iterdir()} == {path.name for path in written}
    assert (run / "events" / "driver.jsonl").read_bytes() == before


def test_a_run_that_has_said_nothing_yet_gives_empty_tables(tmp_path: Path) -> None:
    (tmp_path / "run" / "events").mkdir(parents=True)
    for path in export_run(tmp_path / "run", "parquet"):
        assert parquet.read_table(path).num_rows == 0
