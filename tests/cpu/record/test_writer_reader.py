"""What is written through RecordWriter is what RunReader gives back, whatever happened in between."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from miles.errors import RunError
from miles.record import History, RecordWriter, RunReader


def series(reader: RunReader, name: str) -> list[tuple[int, float]]:
    return list(reader.series(name))


def test_metrics_come_back_by_series_and_by_row(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"rollout/raw_reward": 0.25, "train/lr": np.float32(0.5)})
        writer.metrics(2, {"rollout/raw_reward": 0.75})
        writer.metrics(2, {"eval/sort": 0.5})
    reader = RunReader(tmp_path)
    assert series(reader, "rollout/raw_reward") == [(1, 0.25), (2, 0.75)]
    assert [(row.step, row.metrics) for row in reader.rows()] == [
        (1, {"rollout/raw_reward": 0.25, "train/lr": 0.5}),
        (2, {"rollout/raw_reward": 0.75, "eval/sort": 0.5}),
    ]
    row = reader.rows()[0]
    assert (row.attempt, row.seq) == (1, 0) and row.time > 0


def test_an_unavailable_metric_is_absent_not_zero(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"train/loss": 1.0})
    reader = RunReader(tmp_path)
    assert "train/entropy" not in reader.rows()[0].metrics
    assert len(reader.series("train/entropy")) == 0


def test_an_undeclared_metric_is_refused(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer, pytest.raises(AssertionError, match="train/lss"):
        writer.metrics(1, {"train/lss": 1.0})


def test_a_known_event_without_its_fields_is_refused(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer, pytest.raises(AssertionError, match="tensor"):
        writer.event("non_finite", step=1, what="gradient", count=3)


def test_non_finite_numbers_survive_and_texts_that_look_like_them_stay_texts(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": -math.inf})
        writer.event("note", tensor="nan", values=[1.0, math.nan], deep={"low": -math.inf})
        writer.samples(1, [{"response": "inf", "log_probs": np.array([math.nan, -0.5], np.float32)}])
    lines = (tmp_path / "events" / "driver.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["metrics"] == {
        "train/loss": "nan",
        "train/grad_norm": "inf",
        "train/lr": "-inf",
    }
    reader = RunReader(tmp_path)
    metrics = reader.rows()[0].metrics
    assert math.isnan(metrics["train/loss"])
    assert metrics["train/grad_norm"] == math.inf and metrics["train/lr"] == -math.inf
    (note,) = reader.events("note")
    assert note["tensor"] == "nan" and math.isnan(note["values"][1]) and note["deep"]["low"] == -math.inf
    (sample,) = reader.samples(1)
    assert sample["response"] == "inf" and math.isnan(sample["log_probs"][0])


def test_odd_values_never_raise_into_training(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.event("note", text="half a pair \ud800", big=2**80, path=Path("/x"), key={1: 2})
    (note,) = RunReader(tmp_path).events("note")
    assert note["big"] == str(2**80) and note["path"] == "/x" and note["key"] == {"1": 2}


def test_a_line_is_one_write_and_carries_its_envelope(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, writer="rollout-0", attempt=1) as writer:
        writer.event("note", text="two\nlines")
        (line,) = (tmp_path / "events" / "rollout-0.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert {k: record[k] for k in ("kind", "writer", "attempt", "seq")} == {
        "kind": "note",
        "writer": "rollout-0",
        "attempt": 1,
        "seq": 0,
    }
    assert "step" not in record


def test_a_torn_last_line_is_ignored_until_it_is_whole(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"train/loss": 1.0})
        writer.metrics(2, {"train/loss": 2.0})
    path = tmp_path / "events" / "driver.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    reader = RunReader(tmp_path)
    assert series(reader, "train/loss") == [(1, 1.0)] and reader.bad_lines == 0
    path.write_bytes(whole)
    assert [r["step"] for r in reader.poll()] == [2]
    assert series(reader, "train/loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("cut", [1, 20])
def test_opening_for_append_mends_a_torn_tail(tmp_path: Path, cut: int) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"train/loss": 1.0})
        writer.metrics(2, {"train/loss": 2.0})
    path = tmp_path / "events" / "driver.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with RecordWriter(tmp_path, attempt=2) as writer:
        writer.metrics(3, {"train/loss": 3.0})
    reader = RunReader(tmp_path)
    assert reader.bad_lines == 0
    if cut == 1:  # only the newline was missing: the record is whole
        assert series(reader, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
        assert reader.events("record_repaired") == []
    else:
        assert series(reader, "train/loss") == [(1, 1.0), (3, 3.0)]
        assert reader.events("record_repaired")[0]["dropped_bytes"] > 20


def test_foreign_and_broken_lines_in_the_middle_are_counted(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"train/loss": 1.0})
    with (tmp_path / "events" / "driver.jsonl").open("a") as file:
        file.write('{"half": \n[1, 2]\n{"kind": "stranger"}\n')
    with RecordWriter(tmp_path) as writer:
        writer.metrics(2, {"train/loss": 2.0})
    reader = RunReader(tmp_path)
    assert series(reader, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert reader.bad_lines == 3


def test_a_resumed_attempt_voids_what_older_ones_said_of_later_steps(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        for step in range(1, 8):
            with writer.phase("rollout", step):
                writer.metrics(step, {"train/loss": float(step)})
            writer.samples(step, [{"reward": 0.0}])
            writer.alert(rule="X1", severity="warning", title="odd", step=step)
    with RecordWriter(tmp_path, attempt=2) as writer:
        writer.resume(4)
        writer.metrics(5, {"train/loss": 50.0})
        writer.samples(5, [{"reward": 1.0}])
    reader = RunReader(tmp_path)
    assert series(reader, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]
    assert [row.attempt for row in reader.rows()] == [1, 1, 1, 1, 2]
    assert [alert["step"] for alert in reader.alerts()] == [1, 2, 3, 4]
    assert [phase.step for phase in reader.phases()] == [1, 2, 3, 4]
    assert reader.sample_steps() == [1, 2, 3, 4, 5]
    assert [s["reward"] for s in reader.samples(5)] == [1.0]
    assert reader.samples(6) == []
    assert reader.attempt == 2


def test_attempts_hold_across_writers_whatever_the_order_of_files(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, writer="actor-0") as actor, RecordWriter(tmp_path) as driver:
        for step in (1, 2, 3):
            actor.event("checksum", step=step)
            driver.metrics(step, {"train/loss": 0.0})
    with (
        RecordWriter(tmp_path, "actor-0", attempt=2) as actor,
        RecordWriter(tmp_path, attempt=2) as driver,
        RecordWriter(tmp_path, "zeta", attempt=1) as late,
    ):
        driver.resume(1)
        actor.event("checksum", step=2)
        late.event("checksum", step=3)
    found = [(e["writer"], e["attempt"], e["step"]) for e in RunReader(tmp_path).events("checksum")]
    assert found == [("actor-0", 1, 1), ("actor-0", 2, 2)]


def test_two_resumes_in_a_row_each_void_their_past(tmp_path: Path) -> None:
    for attempt, start, stop in ((1, 0, 6), (2, 4, 7), (3, 2, 3)):
        with RecordWriter(tmp_path, attempt=attempt) as writer:
            if attempt > 1:
                writer.resume(start)
            for step in range(start + 1, stop + 1):
                writer.metrics(step, {"train/loss": float(attempt)})
    assert series(RunReader(tmp_path), "train/loss") == [(1, 1.0), (2, 1.0), (3, 3.0)]


def test_a_live_reader_sees_the_rewind(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.metrics(step, {"train/loss": 1.0})
    reader = RunReader(tmp_path)
    assert reader.history.last_step == 3
    with RecordWriter(tmp_path, attempt=2) as writer:
        writer.resume(1)
        reader.poll()
        assert series(reader, "train/loss") == [(1, 1.0)] and reader.history.last_step == 1
        writer.metrics(2, {"train/loss": 2.0})
    reader.poll()
    assert series(reader, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_history_in_memory_equals_the_history_on_disk(tmp_path: Path) -> None:
    history = History()
    with RecordWriter(tmp_path, history=history) as writer:
        writer.metrics(1, {"train/loss": 1.0})
        writer.event("note", step=1, text="a")
        with writer.phase("train", 1):
            pass
    read = RunReader(tmp_path).history
    assert history.rows() == read.rows()
    assert history.events() == read.events() != []
    assert history.phases == read.phases


def test_phases_have_durations_name_their_error_and_stay_open_when_killed(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        with writer.phase("rollout", 1), writer.phase("reward", 1):
            pass
        with pytest.raises(KeyError), writer.phase("train", 1):
            raise KeyError("x")
        hanging = writer.phase("update_weights", 2)
        hanging.__enter__()
        reader = RunReader(tmp_path)
        phases = reader.phases()
        assert [p.name for p in phases] == ["rollout", "reward", "train", "update_weights"]
        rollout, reward, train, update = phases
        assert rollout.seconds is not None and reward.seconds is not None
        assert rollout.seconds >= reward.seconds >= 0
        assert train.error == "KeyError" and rollout.error is None
        assert update.seconds is None and reader.history.open_phases() == [update]
        hanging.__exit__(None, None, None)
        reader.poll()
        assert reader.history.open_phases() == []


def test_an_open_phase_of_a_dead_attempt_is_not_open_in_the_next(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        hanging = writer.phase("rollout", 1)
        hanging.__enter__()
        assert RunReader(tmp_path).history.open_phases() != []
    with RecordWriter(tmp_path, attempt=2) as writer:
        writer.event("run_start")
    assert RunReader(tmp_path).history.open_phases() == []


def test_an_exception_is_recorded_with_its_causes(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        try:
            try:
                raise ValueError("the real one")
            except ValueError as error:
                raise RuntimeError("wrapper") from error
        except RuntimeError as error:
            writer.exception(error, step=3, worker="trainer-0")
    (event,) = RunReader(tmp_path).events("exception")
    assert (event["type"], event["worker"], event["step"]) == ("RuntimeError", "trainer-0", 3)
    assert "ValueError: the real one" in event["traceback"]


def test_a_full_disk_is_told_once_counted_and_recorded_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RecordWriter(tmp_path) as writer:
        writer.metrics(1, {"train/loss": 1.0})
        size = (tmp_path / "events" / "driver.jsonl").stat().st_size
        try:
            # The kernel now lets no file grow past this size: the first line is cut, the rest fail.
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))
            for step in (2, 3, 4):
                writer.metrics(step, {"train/loss": float(step)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert writer.lost == 3
        writer.metrics(5, {"train/loss": 5.0})
        assert writer.lost == 0
    assert capsys.readouterr().err.count("cannot be written") == 1
    reader = RunReader(tmp_path)
    assert series(reader, "train/loss") == [(1, 1.0), (5, 5.0)]
    (gap,) = reader.events("record_gap")
    assert gap["lost"] == 3 and gap["error"]
    assert reader.bad_lines == 1


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be created"):
        RecordWriter(tmp_path / "file" / "run")


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run"):
        RunReader(tmp_path / "nowhere")
    with pytest.raises(RunError, match="not a run directory"):
        RunReader(tmp_path)


KILLED_WRITER = """
    import sys
    from miles.record import RecordWriter
    writer = RecordWriter(sys.argv[1], heartbeat_interval=0.01)
    step = 0
    while True:
        step += 1
        with writer.phase("rollout", step):
            writer.metrics(step, {"train/loss": float(step), "rollout/raw_reward": 0.5})
        if step == 200:
            print("go", flush=True)
"""


def test_kill_9_loses_no_whole_line_and_the_run_is_seen_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    assert RunReader(tmp_path).status() == "running"
    os.kill(process.pid, signal.SIGKILL)
    # Not yet reaped: a zombie is dead too.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    reader = RunReader(tmp_path)
    assert reader.status() == "dead"
    process.wait()
    process.stdout.close()
    assert RunReader(tmp_path).status() == "dead"
    steps = list(reader.series("train/loss").steps)
    assert len(steps) >= 200 and steps == list(range(1, len(steps) + 1)) and reader.bad_lines == 0


def test_a_hundred_thousand_rows_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    line = '{"kind":"metrics","writer":"driver","attempt":1,"seq":%d,"time":1.0,"step":%d,"metrics":{%s}}\n'
    values = ",".join(f'"route/flip_frac/layer_{i}":0.5' for i in range(10))
    with (tmp_path / "events" / "driver.jsonl").open("w") as file:
        file.writelines(line % (step, step, values) for step in range(1, 100_001))
    reader = RunReader(tmp_path)
    assert len(reader.series("route/flip_frac/layer_9")) == 100_000
    assert reader.history.last_step == 100_000
