"""A fix under way, from the key that confirms it to what the record says came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from started import Started

from miles.record import Inbox, RecordWriter, RunStatus
from miles_cli.dashboard.feed import RunFeed
from miles_cli.dashboard.fixes import LIVE, RESUME, Remedy
from miles_cli.dashboard.mending import FAILED, GOOD, WAITING, begin
from miles_cli.dashboard.snapshot import RunSnapshot

PATCH = {"optimizer.lr": 0.0001}


def nowhere(run_dir: Path) -> None:
    raise AssertionError(f"no new run was asked for: {run_dir}")


def snapshot(run: Path, **changes: Any) -> RunSnapshot:
    return replace(RunFeed(run).snapshot(), **changes)


def remedy(kind: str = RESUME, **options: Any) -> Remedy:
    return Remedy("lower the learning rate", kind, "", PATCH, **options)


@pytest.mark.parametrize(
    ("fields", "state", "text"),
    [
        ({"state": "applied"}, GOOD, "applied after step 120: optimizer.lr = 0.0001"),
        ({"state": "refused", "why": "lr cannot be 7"}, FAILED, "refused after step 120: lr cannot be 7"),
    ],
)
def test_a_live_change_waits_for_the_answer_in_the_record(
    live_run: Path, fields: Mapping[str, str], state: str, text: str
) -> None:
    change = begin(remedy(LIVE), snapshot(live_run), nowhere)
    change.look(snapshot(live_run))
    assert change.state == WAITING
    with RecordWriter(live_run, attempt=2, heartbeat_interval=3600) as writer:
        inbox = Inbox(writer)
        (request,) = inbox.pending()
        assert (request.action, request.patch, request.by) == ("set", PATCH, "watch")
        inbox.acknowledge(request, step=120, **fields)
    change.look(snapshot(live_run))
    assert (change.state, change.text) == (state, text)


def test_a_live_change_that_nobody_heard_is_not_called_done(live_run: Path) -> None:
    change = begin(remedy(LIVE), snapshot(live_run), nowhere)
    change.look(snapshot(live_run, status=RunStatus.DEAD))
    assert change.state == FAILED and "before it heard" in change.text


def test_going_back_resumes_with_the_change_and_follows_the_next_attempt(
    live_run: Path, started: list[Started]
) -> None:
    back = begin(remedy(from_step=80), snapshot(live_run), nowhere)
    (process,) = started
    assert process.arguments == [
        *("runs", "resume", str(live_run), "--stop", "--by", "watch"),
        *("--from-step", "80", "--set", "optimizer.lr=0.0001"),
    ]
    assert process.log.parent == live_run / "logs"
    back.look(snapshot(live_run))
    assert back.state == WAITING
    back.look(snapshot(live_run, attempt=3, resumes={2: 60, 3: 80}))
    assert (back.state, back.text) == (GOOD, "attempt 3 goes on from step 80: optimizer.lr = 0.0001")


def test_an_attempt_that_has_begun_is_not_told_before_it_says_its_step(
    live_run: Path, started: list[Started]
) -> None:
    back = begin(remedy(from_step=80), snapshot(live_run), nowhere)
    with RecordWriter(live_run, attempt=3, heartbeat_interval=3600) as writer:
        writer.event("run_start")
        back.look(snapshot(live_run))
        assert back.state == WAITING
        writer.resume(80)
    back.look(snapshot(live_run))
    assert (back.state, back.text) == (GOOD, "attempt 3 goes on from step 80: optimizer.lr = 0.0001")


def test_an_attempt_that_is_over_at_the_first_look_is_told_all_the_same(
    live_run: Path, started: list[Started]
) -> None:
    back = begin(remedy(from_step=80), snapshot(live_run), nowhere)
    started[0].exit_code = 0
    with RecordWriter(live_run, attempt=3, heartbeat_interval=3600) as writer:
        writer.event("run_start")
        writer.resume(80)
        writer.event("run_end", status="finished")
    back.look(snapshot(live_run, status=RunStatus.FINISHED))
    assert (back.state, back.text) == (GOOD, "attempt 3 goes on from step 80: optimizer.lr = 0.0001")


def test_an_attempt_that_fails_before_it_says_its_step_shows_why(
    live_run: Path, started: list[Started]
) -> None:
    back = begin(remedy(from_step=80), snapshot(live_run), nowhere)
    with RecordWriter(live_run, attempt=3, heartbeat_interval=3600) as writer:
        writer.event("run_start")
    started[0].exit_code, started[0].error = 1, "error: the checkpoint cannot be read"
    back.look(snapshot(live_run))
    assert (back.state, back.text) == (FAILED, "error: the checkpoint cannot be read")


def test_a_resume_that_is_refused_shows_why(live_run: Path, started: list[Started]) -> None:
    back = begin(remedy(from_step=80), snapshot(live_run), nowhere)
    started[0].exit_code, started[0].error = 1, "error: no checkpoint of step 80"
    back.look(snapshot(live_run))
    assert (back.state, back.text) == (FAILED, "error: no checkpoint of step 80")


def test_starting_over_stops_the_run_first_and_shows_the_new_one(
    live_run: Path, started: list[Started], tmp_path: Path
) -> None:
    shown: list[Path] = []
    fresh = begin(remedy(start_over=True), snapshot(live_run), shown.append)
    with RecordWriter(live_run, attempt=2, heartbeat_interval=3600) as writer:
        assert [request.action for request in Inbox(writer).pending()] == ["stop"]
    fresh.look(snapshot(live_run))
    assert started == []
    fresh.look(snapshot(live_run, status=RunStatus.STOPPED))
    (process,) = started
    assert process.arguments == [
        *("train", "--parent", str(live_run), "--by", "watch"),
        *("--set", "optimizer.lr=0.0001"),
    ]
    process.directory = tmp_path / "new"
    fresh.look(snapshot(live_run, status=RunStatus.STOPPED))
    assert fresh.state == GOOD and shown == [tmp_path / "new"]
