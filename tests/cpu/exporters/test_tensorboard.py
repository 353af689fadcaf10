"""What TensorBoard itself reads from our event files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from miles.exporters import export_run
from miles.exporters.event_file import EventFile, crc32c
from miles.exporters.tensorboard import TensorBoardSink


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """Points of one tag as TensorBoard shows them."""
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_every_live_value_is_read_back_under_its_name(run: Path, tmp_path: Path) -> None:
    (path,) = export_run(run, "tensorboard", tmp_path / "tb")
    assert path.parent == tmp_path / "tb" / "sort-1"
    points = scalars(path.parent, "rollout/raw_reward")
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in points] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert scalars(path.parent, "eval/sort") == [(6, 0.75)]


def test_a_nan_stays_a_nan(run: Path, tmp_path: Path) -> None:
    (path,) = export_run(run, "tensorboard", tmp_path)
    values = dict(scalars(path.parent, "train/loss"))
    assert math.isnan(values[5])
    assert values[6] == 0.25


def test_exporting_again_replaces_and_leaves_the_files_of_others_alone(run: Path, tmp_path: Path) -> None:
    (path,) = export_run(run, "tensorboard", tmp_path)
    foreign = path.parent / "events.out.tfevents.1.somebody"
    foreign.write_bytes(b"")
    assert export_run(run, "tensorboard", tmp_path) == [path]
    assert len(scalars(path.parent, "train/loss")) == 6
    assert foreign.exists()


def test_after_a_rewind_tensorboard_forgets_the_abandoned_steps(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in range(1, 6):
        sink.log(step, 100.0 + step, {"train/loss": 1.0})
    sink.rewind(2)
    sink.log(3, 200.0, {"train/loss": 2.0})
    sink.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_second_process_continues_in_a_file_that_tensorboard_reads_after_the_first(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path, clock=1000.0)
    first.log(1, 1000.0, {"train/loss": 1.0})
    first.close()
    second = TensorBoardSink(tmp_path, clock=1000.0)
    second.log(2, 1001.0, {"train/loss": 2.0})
    second.close()
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_extreme_values_and_names_survive(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events.out.tfevents.1", time=1.0)
    file.scalars(2**40, 1.0, {"train/größe": 1e300, "b": -math.inf, "c": 1e-45})
    file.close()
    (step, value), *_ = scalars(tmp_path, "train/größe")
    assert (step, value) == (2**40, math.inf)
    assert scalars(tmp_path, "b") == [(2**40, -math.inf)]
    assert scalars(tmp_path, "c")[0][1] == pytest.approx(1e-45, rel=0.5)
