"""`miles watch`: one frame, or one line per step until the run ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from miles.errors import ConfigError, ExitCode, RunError
from miles.record import History, RecordWriter, RunStatus, summarise, write_summary
from miles_cli import watch_lines
from miles_cli.app import build
from miles_cli.dashboard.symbols import LADDER
from miles_cli.dashboard.track import Track
from miles_cli.render.run_frame import frame_lines, load_snapshot
from miles_cli.render.sparkline import sparkline


@pytest.fixture(autouse=True)
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILES_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def step_metrics(step: int) -> dict[str, float]:
    return {
        "rollout/raw_reward": step / 20,
        "train/entropy": 0.5,
        "train/train_rollout_logprob_abs_diff": 0.2,
        "perf/step_time": 0.5,
    }


def write_run(path: Path, status: RunStatus | None = RunStatus.FINISHED) -> Path:
    history = History()
    with RecordWriter(path, history=history) as writer:
        for step in range(1, 21):
            with writer.phase("rollout", step):
                pass
            writer.metrics(step, step_metrics(step))
        writer.alert(rule="MM6", severity="critical", title="Log-prob gap", step=3)
        if status is not None:
            write_summary(path, summarise(history, status, 2.5, "c0ffee"))
    (path / "config.json").write_text('{"values": {"rollout": {"num_rollout": 20}}, "origins": {}}')
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(build(list(arguments)), list(arguments))


def test_one_frame_shows_progress_curve_metrics_and_alerts(runs_dir: Path) -> None:
    write_run(runs_dir / "quick")
    result = invoke("watch", "quick", "--once")
    assert result.exit_code == ExitCode.OK
    text = result.stdout
    assert "quick" in text and "finished" in text and "step 20/20" in text
    assert "mean reward  1" in text
    assert any(0x2800 < ord(c) < 0x2900 for c in text), "the curve is drawn in braille"
    gap = next(line for line in text.splitlines() if "train_rollout_logprob_abs_diff" in line)
    assert "0.2" in gap and "✗ 0 – 0.03" in gap
    assert "◆ critical MM6 Log-prob gap (step 3)" in text
    assert "\x1b" not in result.stdout + result.stderr
    assert "miles diagnose quick" in result.stderr


@pytest.mark.parametrize("width", [40, 60, 80, 200])
@pytest.mark.parametrize("symbols", ["braille", "block", "ascii"])
def test_a_frame_keeps_to_its_width_and_its_symbols(runs_dir: Path, width: int, symbols: str) -> None:
    snapshot = load_snapshot(write_run(runs_dir / "quick"))
    lines = frame_lines(snapshot, width, LADDER[symbols])
    assert max(map(len, lines)) <= width
    gap = next(line for line in lines if "logprob_abs_diff" in line)
    assert "0.2" in gap and LADDER[symbols].bad in gap, "the value and its mark, in whatever room there is"
    if symbols == "ascii":
        body = "".join(lines).replace("≤", "").replace("≥", "").replace("–", "")
        assert body.isascii()


def test_a_frame_shows_which_exact_numerics_were_found(runs_dir: Path) -> None:
    run = write_run(runs_dir / "quick")
    found = {"rows": "blocks of 4 to 1024 in fp32", "attention": "fp32, at least 4 query rows"}
    assert "numerics" not in invoke("watch", "quick", "--once").stdout
    with RecordWriter(run) as writer:
        writer.event("numerics", step=1, numerics="exact", **found)
    frame = " ".join(invoke("watch", "quick", "--once").stdout.split())
    assert "exact numerics: rows: blocks of 4 to 1024 in fp32; attention: fp32, at least 4" in frame
    told = json.loads(invoke("watch", "quick", "--once", "--json").stdout)["numerics"]
    assert told == {"numerics": "exact", **found}


def test_json_is_one_object_with_the_last_values(runs_dir: Path) -> None:
    run = write_run(runs_dir / "quick", status=None)
    with RecordWriter(run) as writer:
        writer.metrics(21, {"train/loss": math.nan})
        result = invoke("watch", "--once", "--json")
    assert result.exit_code == ExitCode.RUNNING
    frame = json.loads(result.stdout)
    assert (frame["run_id"], frame["status"], frame["step"], frame["total_steps"]) == (
        "quick",
        "running",
        21,
        20,
    )
    assert frame["metrics"]["train/loss"] == "nan"
    assert frame["unhealthy"] == ["train/train_rollout_logprob_abs_diff"]
    assert [alert["rule"] for alert in frame["alerts"]] == ["MM6"]


@pytest.mark.parametrize(
    ("status", "code"), [(RunStatus.STOPPED, 0), (RunStatus.FAILED, 1), (RunStatus.INTERRUPTED, 130)]
)
def test_the_exit_code_tells_how_the_run_ended(runs_dir: Path, status: RunStatus, code: int) -> None:
    write_run(runs_dir / "quick", status)
    assert invoke("watch", "--once").exit_code == code


def test_an_empty_run_directory_has_a_frame_too(runs_dir: Path) -> None:
    (runs_dir / "new" / "events").mkdir(parents=True)
    result = invoke("watch", "--once")
    assert result.exit_code == ExitCode.RUNNING and "no open alerts" in result.stdout


def test_following_prints_a_line_per_step_and_ends_with_the_run(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(runs_dir / "quick", status=None)
    history = History()
    writer = RecordWriter(run, history=history)

    def finish(seconds: float) -> None:
        """While nothing is new."""
        writer.metrics(21, step_metrics(21) | {"eval/sort": 0.5})
        writer.alert(rule="RO2", severity="warning", title="cut", step=21)
        write_summary(run, summarise(history, RunStatus.FINISHED, 1.0, "x"))

    monkeypatch.setattr(watch_lines, "time", SimpleNamespace(sleep=finish))
    result = invoke("watch", "quick")
    writer.close()
    assert result.exit_code == ExitCode.OK
    lines = result.stdout.splitlines()
    assert lines[0].startswith("step 11/20"), "the last ten steps of the past come first"
    assert lines[-2].startswith("step 21/20") and "reward 1.050" in lines[-2]
    assert lines[-1] == "step 21/20  eval/sort 0.500"
    assert "warning RO2 cut (raised)" in result.stderr


def test_a_run_that_failed_says_why_in_every_way_to_look_at_it(runs_dir: Path) -> None:
    run = runs_dir / "sick"
    history = History()
    with RecordWriter(run, history=history) as writer:
        writer.exception(RunError("the disk is full", where="/data", why="no room"))
        write_summary(run, summarise(history, RunStatus.FAILED, 2.5, "c0ffee"))
    followed = invoke("watch", "sick")
    assert (followed.exit_code, followed.stdout) == (ExitCode.FAILED, "")
    assert followed.stderr.startswith("sick: failed\n  RunError: /data: the disk is full\n")
    assert followed.stderr.endswith("Next: miles diagnose sick\n")
    frame = invoke("watch", "sick", "--once").stdout
    assert "✗ RunError in driver: /data: the disk is full\n   why: no room" in frame
    assert "no open alerts" not in frame


def test_symbols_that_no_terminal_has_are_refused(runs_dir: Path) -> None:
    write_run(runs_dir / "quick")
    for arguments in (("--once",), ("--plain",), ()):
        error = invoke("watch", "quick", "--symbols", "emoji", *arguments).exception
        assert isinstance(error, ConfigError) and "take one of braille, block, ascii" in str(error)


def test_a_port_that_cannot_be_is_a_usage_error(runs_dir: Path) -> None:
    write_run(runs_dir / "quick")
    assert invoke("watch", "quick", "--web", "--port", "99999").exit_code == ExitCode.USAGE


def test_ascii_symbols_print_ascii_alone(runs_dir: Path) -> None:
    write_run(runs_dir / "quick")
    assert invoke("watch", "quick", "--once", "--symbols", "ascii").stdout.isascii()


def test_following_as_json_prints_every_record(runs_dir: Path) -> None:
    write_run(runs_dir / "quick")
    result = invoke("watch", "quick", "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert sum(record["kind"] == "metrics" for record in records) == 20
    assert {record["kind"] for record in records} == {"metrics", "phase_start", "phase_end", "alert"}


@pytest.mark.parametrize("name", ["braille", "block", "ascii"])
def test_a_sparkline_has_its_width_and_marks_a_nan(name: str) -> None:
    track = Track()
    track.extend(range(40), [float(i) if i != 20 else math.nan for i in range(40)])
    text = sparkline(track.view(), 0, 39, 10, LADDER[name])
    assert len(text) == 10 and LADDER[name].nan in text
    assert len(set(text)) > 2
