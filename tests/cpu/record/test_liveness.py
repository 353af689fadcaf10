"""Heartbeat, status, summary, inbox and the list of runs."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from miles.errors import RunError
from miles.record import (
    History,
    Inbox,
    RecordWriter,
    RunReader,
    RunStatus,
    Summary,
    create_run_dir,
    post_request,
    read_summary,
    summarise,
    write_summary,
)
from miles.record.heartbeat import Heartbeat, process_exists, process_start, read_heartbeats
from miles.record.json_file import write_json
from miles.record.runs import describe_run, find_runs, resolve_run


def summary_of(history: History, status: RunStatus = RunStatus.FINISHED) -> Summary:
    return summarise(history, status, seconds=1.5, config_hash="c0ffee")


def test_heartbeat_tells_phase_and_step_and_keeps_beating_while_the_process_is_busy(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, heartbeat_interval=0.02) as writer, writer.phase("rollout", 7):
        first = read_heartbeats(tmp_path / "heartbeat")["driver"]
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            beat = read_heartbeats(tmp_path / "heartbeat")["driver"]
            if beat.time > first.time and beat.phase == "rollout":
                break
            time.sleep(0.01)
    assert (beat.pid, beat.phase, beat.step, beat.attempt) == (os.getpid(), "rollout", 7, 1)
    assert beat.time > first.time


def test_heartbeat_is_written_at_most_once_per_interval(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, heartbeat_interval=3600) as writer:
        path = tmp_path / "heartbeat" / "driver.json"
        before = path.read_bytes()
        for step in range(1, 50):
            writer.metrics(step, {"train/loss": 0.0})
            writer.heartbeat()
        assert path.read_bytes() == before
        assert [file for file in path.parent.iterdir() if file.suffix != ".stacks"] == [path]


def test_a_later_process_with_the_same_pid_is_not_the_run() -> None:
    mine = process_start(os.getpid())
    assert process_exists(os.getpid(), mine)
    assert not process_exists(os.getpid(), "1")


def test_another_machine_is_judged_by_the_age_of_its_heartbeat(tmp_path: Path) -> None:
    with RecordWriter(tmp_path):
        beat = read_heartbeats(tmp_path / "heartbeat")["driver"]
    elsewhere = replace(beat, host="far", pid=1, time=1000.0, interval=5.0)
    assert elsewhere.alive(now=1030.0)
    assert not elsewhere.alive(now=1100.0)


def test_status_follows_the_latest_attempt(tmp_path: Path) -> None:
    run = create_run_dir(tmp_path, "quick")
    reader = RunReader(run)
    assert reader.status() is RunStatus.EMPTY
    history = History()
    with RecordWriter(run, history=history) as writer:
        writer.metrics(1, {"train/loss": 0.0})
        assert reader.status() is RunStatus.RUNNING
        write_summary(run, summary_of(history, RunStatus.STOPPED))
        assert reader.status() is RunStatus.STOPPED
    with RecordWriter(run, attempt=2):
        assert reader.status() is RunStatus.RUNNING


def test_a_run_that_ends_while_its_status_is_asked_for_is_not_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, history = create_run_dir(tmp_path, "quick"), History()
    with RecordWriter(run, history=history) as writer:
        writer.metrics(1, {"train/loss": 0.0})

    def ends(beat: Heartbeat) -> bool:
        write_summary(run, summary_of(history))
        return False

    monkeypatch.setattr(Heartbeat, "alive", ends)
    assert RunReader(run).status() is RunStatus.FINISHED


def test_summary_holds_what_a_table_of_runs_wants(tmp_path: Path) -> None:
    history = History()
    with RecordWriter(tmp_path, history=history) as writer:
        writer.metrics(0, {"eval/sort": 0.36, "eval/sort-greedy": 0.95, "eval/sort-truncated_ratio": 0.1})
        for step in range(1, 21):
            writer.metrics(step, {"rollout/raw_reward": step / 20, "train/loss": math.nan})
        writer.metrics(20, {"eval/sort": 0.92, "eval/sort-greedy": 0.97})
        for state in ("raised", "cleared", "raised"):
            writer.alert(rule="RO2", severity="warning", title="truncation", step=3, state=state)
        write_summary(tmp_path, summary_of(history))
    summary = read_summary(tmp_path)
    assert summary is not None
    assert (summary.status, summary.steps, summary.attempt, summary.seconds) == ("finished", 20, 1, 1.5)
    assert summary.reward_first5 == pytest.approx(0.15)
    assert summary.reward_last5 == pytest.approx(0.9)
    assert summary.eval_before == {"sort": {"sampled": 0.36, "greedy": 0.95}}
    assert summary.eval_after == {"sort": {"sampled": 0.92, "greedy": 0.97}}
    assert summary.alerts == {"critical": 0, "warning": 2, "info": 0}
    assert summary.metrics["rollout/raw_reward"] == 1.0 and math.isnan(summary.metrics["train/loss"])
    assert summary.config_hash == "c0ffee" and summary.code_version
    assert json.loads((tmp_path / "summary.json").read_text())["reward_last5"] == pytest.approx(0.9)


def test_a_run_that_measured_nothing_claims_nothing(tmp_path: Path) -> None:
    summary = summary_of(History(), RunStatus.FAILED)
    assert summary.reward_first5 is None and summary.eval_before == {} and summary.metrics == {}


def test_requests_are_taken_in_order_and_acknowledged_as_events(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        inbox = Inbox(writer)
        assert inbox.pending() == []
        post_request(tmp_path, "save")
        post_request(tmp_path, "stop", by="dashboard")
        save, stop = inbox.pending()
        assert (save.action, stop.action) == ("save", "stop")
        inbox.acknowledge(save)
        assert inbox.pending() == [stop]
        inbox.acknowledge(stop, step=4)
        assert inbox.pending() == []
        acks = RunReader(tmp_path).events("control")
    assert [(a["action"], a["state"], a["by"]) for a in acks] == [
        ("save", "applied", "cli"),
        ("stop", "applied", "dashboard"),
    ]
    assert acks[1]["step"] == 4
    assert len(list((tmp_path / "control" / "handled").iterdir())) == 2


def test_a_stop_meant_for_a_dead_attempt_does_not_stop_the_next(tmp_path: Path) -> None:
    with RecordWriter(tmp_path):
        post_request(tmp_path, "stop")
    with RecordWriter(tmp_path, attempt=2) as writer:
        assert Inbox(writer).pending() == []
    (ack,) = RunReader(tmp_path).events("control")
    assert ack["state"] == "expired"


def test_unknown_and_unreadable_requests_are_refused_in_the_record(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        request = post_request(tmp_path, "stop")
        path = tmp_path / "control" / f"{request.id}.json"
        write_json(path, json.loads(path.read_text()) | {"action": "explode"})
        (tmp_path / "control" / "0-broken.json").write_text("{")
        assert Inbox(writer).pending() == []
    acks = RunReader(tmp_path).events("control")
    assert [a["state"] for a in acks] == ["refused", "refused"]


def make_run(runs: Path, name: str, active: float) -> Path:
    run = runs / name
    with RecordWriter(run) as writer:
        writer.metrics(1, {"rollout/raw_reward": 0.5})
    for path in (run, run / "events" / "driver.jsonl"):
        os.utime(path, (active, active))
    return run


def test_a_run_is_found_by_id_unique_beginning_path_or_last(tmp_path: Path) -> None:
    first = make_run(tmp_path, "quick-20260101", 1000)
    second = make_run(tmp_path, "quick-20260202", 3000)
    third = make_run(tmp_path, "other-1", 2000)
    (tmp_path / "not-a-run").mkdir()
    assert find_runs(tmp_path) == [second, third, first]
    assert resolve_run(None, tmp_path) == resolve_run("last", tmp_path) == second
    assert resolve_run("quick-20260101", tmp_path) == first
    assert resolve_run("oth", tmp_path) == third
    assert resolve_run(str(first), tmp_path / "elsewhere") == first


def test_an_unknown_or_ambiguous_run_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no runs yet"):
        resolve_run(None, tmp_path / "missing")
    make_run(tmp_path, "quick-a", 1)
    make_run(tmp_path, "quick-b", 2)
    with pytest.raises(RunError, match="beginning of 2 runs"):
        resolve_run("quick", tmp_path)
    with pytest.raises(RunError, match=r"did you mean quick-[ab]"):
        resolve_run("quikc-a", tmp_path)


def test_a_described_run_has_progress_and_reward(tmp_path: Path) -> None:
    run = make_run(tmp_path, "quick", 1000)
    (run / "config.json").write_text('{"values": {"rollout": {"num_rollout": 80}}, "origins": {}}')
    info = describe_run(run)
    assert (info.id, info.step, info.total_steps, info.reward, info.attempts) == ("quick", 1, 80, 0.5, 1)


def test_run_directories_never_collide(tmp_path: Path) -> None:
    made = {create_run_dir(tmp_path, "quick") for _ in range(5)}
    assert len(made) == 5 and all((run / "samples").is_dir() for run in made)
