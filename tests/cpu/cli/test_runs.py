"""`miles runs ls|show|stop`."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from miles.errors import ConfigError, ExitCode, RunError
from miles.record import History, Inbox, RecordWriter, RunStatus, summarise, write_summary
from miles_cli.app import build


@pytest.fixture(autouse=True)
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILES_RUNS_DIR", str(tmp_path))
    return tmp_path


def write_run(path: Path, finish: bool = True) -> Path:
    history = History()
    with RecordWriter(path, history=history) as writer:
        writer.metrics(0, {"eval/sort": 0.36, "eval/sort-greedy": 0.9})
        for step in range(1, 11):
            writer.metrics(step, {"rollout/raw_reward": step / 10})
        writer.metrics(10, {"eval/sort": 0.92, "eval/sort-greedy": 0.95})
        writer.event("checkpoint", step=10, path="checkpoints/step-000010")
        if finish:
            write_summary(path, summarise(history, RunStatus.FINISHED, 2.5, "c0ffee"))
    config = {"optimizer": {"lr": 4e-4}, "rollout": {"num_rollout": 10}}
    (path / "config.json").write_text(json.dumps({"values": config, "origins": {}}))
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(build(list(arguments)), list(arguments))


def test_ls_shows_status_progress_and_reward(runs_dir: Path) -> None:
    write_run(runs_dir / "quick-1")
    write_run(runs_dir / "quick-2", finish=False)
    result = invoke("runs", "ls")
    heading, *rows = result.stdout.splitlines()
    assert heading.split() == ["RUN", "STATUS", "STEP", "REWARD", "TOOK", "ACTIVE"]
    cells = {row.split()[0]: row.split() for row in rows}
    assert cells["quick-1"][1:4] == ["finished", "10/10", "0.800"]
    assert cells["quick-2"][1] == "running"
    assert "Next:" in result.stderr


def test_ls_json_is_a_list(runs_dir: Path) -> None:
    write_run(runs_dir / "quick-1")
    (row,) = json.loads(invoke("runs", "ls", "--json").stdout)
    assert (row["id"], row["status"], row["step"], row["total_steps"]) == ("quick-1", "finished", 10, 10)


def test_ls_without_runs_says_how_to_start_one(runs_dir: Path) -> None:
    result = invoke("runs", "ls")
    assert result.exit_code == 0 and result.stdout == "" and "miles train" in result.stderr
    assert json.loads(invoke("runs", "ls", "--json").stdout) == []


def test_show_tells_settings_checkpoints_and_results(runs_dir: Path) -> None:
    write_run(runs_dir / "quick-1")
    result = invoke("runs", "show", "quick")
    assert result.exit_code == ExitCode.OK
    text = result.stdout
    assert "quick-1: finished, step 10" in text
    assert "0.300 -> 0.800" in text
    assert "sort sampled  0.36 -> 0.92" in text and "sort greedy   0.9 -> 0.95" in text
    assert "checkpoints  10" in text and "optimizer.lr" in text


def test_show_json_and_the_exit_code_of_a_run_that_goes_on(runs_dir: Path) -> None:
    write_run(runs_dir / "quick-1", finish=False)
    result = invoke("runs", "show", "--json")
    assert result.exit_code == ExitCode.RUNNING
    shown = json.loads(result.stdout)
    assert shown["status"] == "running" and shown["summary"] is None
    assert shown["metrics"]["rollout/raw_reward"] == 1.0
    assert shown["checkpoints"] == [{"step": 10, "path": "checkpoints/step-000010"}]


def test_stop_leaves_a_request_that_the_run_takes_up(runs_dir: Path) -> None:
    run = write_run(runs_dir / "quick-1", finish=False)
    result = invoke("runs", "stop", "quick-1")
    assert result.exit_code == 0 and "asked to stop" in result.stdout
    with RecordWriter(run) as writer:
        (request,) = Inbox(writer).pending()
    assert request.action == "stop"


def test_stop_refuses_a_run_that_has_ended(runs_dir: Path) -> None:
    write_run(runs_dir / "quick-1")
    result = invoke("runs", "stop", "quick-1")
    assert isinstance(result.exception, RunError) and "the run is finished" in str(result.exception)
    assert result.exception.fix == "", "resuming is not what stops a run"


def test_show_says_why_a_run_failed(runs_dir: Path) -> None:
    run = runs_dir / "sick"
    history = History()
    with RecordWriter(run, history=history) as writer:
        writer.exception(RunError("the disk is full", where="/data"))
        write_summary(run, summarise(history, RunStatus.FAILED, 2.5, "c0ffee"))
    result = invoke("runs", "show", "sick")
    assert "RunError: /data: the disk is full" in result.stdout
    assert "last values" not in result.stdout
    assert result.stderr == "Next: miles diagnose sick\n"
    assert (
        json.loads(invoke("runs", "show", "--json").stdout)["ended_by"] == "RunError: /data: the disk is full"
    )


def test_a_live_setting_is_posted_and_the_answer_awaited(runs_dir: Path) -> None:
    run = runs_dir / "live"
    with RecordWriter(run) as writer:
        writer.metrics(1, {"rollout/raw_reward": 0.5})
        result = invoke("runs", "set", "live", "optimizer.lr=1e-4", "algorithm.kl_loss_coef=0.01")
        assert result.exit_code == ExitCode.OK and "asked to change" in result.stdout
        (request,) = Inbox(writer).pending()
        assert (request.action, request.by) == ("set", "cli")
        assert request.patch == {"optimizer.lr": 1e-4, "algorithm.kl_loss_coef": 0.01}


@pytest.mark.parametrize("state", ["applied", "refused"])
def test_the_answer_of_the_run_is_the_answer_of_the_command(runs_dir: Path, state: str) -> None:
    with RecordWriter(runs_dir / "live") as writer:
        inbox, done = Inbox(writer), threading.Event()

        def answer() -> None:
            while not done.is_set():
                for request in inbox.pending():
                    inbox.acknowledge(request, state, why="because")
                done.wait(0.02)

        thread = threading.Thread(target=answer)
        thread.start()
        result = invoke("runs", "set", "live", "optimizer.lr=1e-4", "--wait")
        done.set()
        thread.join()
    assert state in result.stdout
    assert isinstance(result.exception, RunError) == (state == "refused")


def test_what_is_not_live_and_what_is_no_number_is_refused_before_anything_is_posted(runs_dir: Path) -> None:
    with RecordWriter(runs_dir / "live") as writer:
        for word, says in (
            ("optimizer.lrr=1", "did you mean optimizer.lr?"),
            ("run.seed=2", "miles runs resume"),
            ("optimizer.lr=fast", "no number"),
        ):
            result = invoke("runs", "set", "live", word)
            assert isinstance(result.exception, ConfigError) and says in str(result.exception)
        assert Inbox(writer).pending() == []


def test_a_run_that_has_ended_is_changed_by_resuming_it(runs_dir: Path) -> None:
    write_run(runs_dir / "quick-1")
    result = invoke("runs", "set", "quick-1", "optimizer.lr=1e-4")
    assert isinstance(result.exception, RunError)
    assert "miles runs resume quick-1 --set optimizer.lr=1e-4" in str(result.exception)
