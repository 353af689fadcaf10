"""From files to snapshots: attempts, alerts, live tails, large records."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from frames import RUN

from miles.record import RecordWriter, RunReader, RunStatus
from miles_cli.dashboard import feed as feed_module
from miles_cli.dashboard.feed import RunFeed, pair_alerts
from miles_cli.dashboard.snapshot import RunSnapshot

REWARD = "rollout/raw_reward"


def write(run: Path, steps: range, attempt: int = 1, resumed: int | None = None) -> None:
    with RecordWriter(run, attempt=attempt, heartbeat_interval=3600) as writer:
        if resumed is not None:
            writer.resume(resumed)
        for step in steps:
            with writer.phase("rollout", step):
                pass
            writer.metrics(step, {REWARD: step * attempt, "train/loss": math.nan if step == 3 else 1.0})


def test_a_finished_run_is_told_from_its_directory_alone() -> None:
    run = RunFeed(RUN).snapshot()
    assert (run.status, run.step, run.total, run.attempt) == (RunStatus.FINISHED, 120, 120, 2)
    assert run.tracks["train/grad_norm"].at(87) != run.tracks["train/grad_norm"].at(87)
    assert [a.rule for a in run.open_alerts] == ["MM6", "MM8"]
    assert next(a for a in run.alerts if a.rule == "NF1").cleared_step == 107


def test_a_directory_that_is_taken_away_leaves_what_was_read(tmp_path: Path) -> None:
    write(tmp_path / "run", range(1, 4))
    feed = RunFeed(tmp_path / "run")
    assert feed.snapshot().step == 3
    shutil.rmtree(tmp_path / "run")
    feed.advance()
    run = feed.snapshot()
    assert run.step == 3 and run.cause_of_death is not None and "taken away" in run.cause_of_death


def test_steps_of_an_abandoned_attempt_are_gone(tmp_path: Path) -> None:
    write(tmp_path, range(1, 11))
    feed = RunFeed(tmp_path)
    assert feed.snapshot().tracks[REWARD].last == 10
    write(tmp_path, range(6, 8), attempt=2, resumed=5)
    assert feed.advance()
    track = feed.snapshot().tracks[REWARD]
    assert (track.last_step, track.at(5), track.at(6)) == (7, 5, 12)


def test_a_run_that_is_told_to_have_ended_is_told_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last steps are written while its status is asked for."""
    write(tmp_path, range(1, 3))
    feed = RunFeed(tmp_path)

    def ends(reader: RunReader) -> RunStatus:
        write(tmp_path, range(3, 5))
        return RunStatus.FINISHED

    monkeypatch.setattr(RunReader, "status", ends)
    assert feed.advance()
    run = feed.snapshot()
    assert (run.status, run.step) == (RunStatus.FINISHED, 4)


def test_new_rows_arrive_and_a_torn_line_waits(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    feed = RunFeed(tmp_path)
    before = feed.snapshot()
    events = tmp_path / "events" / "driver.jsonl"
    whole = events.read_bytes()
    write(tmp_path, range(3, 4))
    line = events.read_bytes()[len(whole) :]
    events.write_bytes(whole + line[:-20])
    feed.advance()
    assert feed.snapshot().step == 2
    events.write_bytes(whole + line)
    feed.advance()
    assert feed.snapshot().step == 3
    assert before.step == 2


def test_a_large_record_is_outlined_first_and_then_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "SKIM_FROM", 10_000)
    monkeypatch.setattr(feed_module, "PIECE", 50_000)
    write(tmp_path, range(1, 3001))
    feed = RunFeed(tmp_path)
    outline = feed.snapshot()
    assert outline.loading is not None
    assert outline.first_step == 1
    assert outline.step == 3000
    pieces = 0
    while feed.loading:
        feed.advance()
        pieces += 1
    assert pieces > 3
    complete = feed.snapshot()
    assert complete.loading is None
    assert len(complete.tracks[REWARD].steps) == 3000


def test_the_outline_follows_the_live_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "SKIM_FROM", 10_000)
    monkeypatch.setattr(feed_module, "PIECE", 1_000)
    write(tmp_path, range(1, 2001))
    feed = RunFeed(tmp_path)
    write(tmp_path, range(2001, 2003))
    feed.advance()
    assert feed.loading
    assert feed.snapshot().step == 2002


def test_skimming_an_unfinished_file_leaves_its_torn_end(tmp_path: Path) -> None:
    write(tmp_path, range(1, 500))
    events = tmp_path / "events" / "driver.jsonl"
    whole = events.read_bytes()
    events.write_bytes(whole + b'{"kind": "metr')
    reader = RunReader(tmp_path, read=False)
    reader.skim(blocks=8, block_bytes=600)
    assert reader.history.last_step == 499
    assert 8 <= len(reader.rows()) < 499
    assert reader.unread_bytes == 14
    assert reader.poll() == []


def test_piecewise_polling_reads_everything_once(tmp_path: Path) -> None:
    write(tmp_path, range(1, 200))
    reader = RunReader(tmp_path, read=False)
    while reader.unread_bytes:
        assert reader.poll(max_bytes=100)
    assert [row.step for row in reader.rows()] == list(range(1, 200))


def test_memory_of_what_was_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "EXACT", 200)
    write(tmp_path, range(1, 2001))
    feed = RunFeed(tmp_path)
    assert len(feed.reader.rows()) <= 200
    assert len(feed.reader.history.phases) <= 201
    assert feed.snapshot().tracks[REWARD].first_step == 1


def test_an_alert_that_gets_worse_is_one_alert() -> None:
    def event(rule: str, state: str, severity: str, step: int) -> dict[str, object]:
        return {"rule": rule, "state": state, "severity": severity, "title": "t", "step": step, "time": step}

    paired = pair_alerts(
        [
            event("MM6", "raised", "warning", 5),
            event("NF1", "raised", "critical", 6),
            event("MM6", "raised", "critical", 8),
            event("NF1", "cleared", "critical", 9),
            event("NF1", "raised", "critical", 12),
        ]
    )
    assert [(a.rule, a.severity, a.step, a.cleared) for a in paired] == [
        ("MM6", "critical", 5, False),
        ("NF1", "critical", 6, True),
        ("NF1", "critical", 12, False),
    ]


def test_phases_are_measured_against_their_own_median() -> None:
    run: RunSnapshot = RunFeed(RUN).snapshot()
    assert 0.5 < run.medians["rollout"] < 0.75
    assert list(run.phase_totals)[-2:] == ["eval", "save"]
    assert run.phase_totals["rollout"] > run.phase_totals["train"] > run.phase_totals["update_weights"]
    assert run.step_seconds is not None
    slow = [line.text for line in run.log if "usually" in line.text]
    assert slow == ["rollout took 2.2s, usually 0.6s"]
