"""A user's mistake is one message with place, cause and next step, the right exit code, and no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from miles.errors import ExitCode, RunError
from miles_cli import errors
from miles_cli.speech import say

Miles = Callable[..., "subprocess.CompletedProcess[str]"]

GOOD = ("train", "--profile", "quickstart", "--dry-run")


def refused(done: subprocess.CompletedProcess[str], code: ExitCode) -> str:
    """The message of a command that must fail with this code."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_typo_in_a_key(miles: Miles, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[optimizer]\nlr = 1e-4\nweight_decya = 0.1\n")
    message = refused(miles(*GOOD, "--config", "run.toml"), ExitCode.USAGE)
    assert "run.toml:3" in message
    assert "did you mean optimizer.weight_decay?" in message


def test_wrong_type(miles: Miles, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[optimizer]\nlr = "1e-4"\n')
    message = refused(miles(*GOOD, "--config", "run.toml"), ExitCode.USAGE)
    assert "run.toml:2" in message
    assert "optimizer.lr must be a number" in message
    assert "without quotes" in message


def test_all_mistakes_of_a_file_in_one_pass(miles: Miles, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[optimizer]\nlr = "1e-4"\nweight_decya = 0.1\n[rollot]\nx = 1\n')
    message = refused(miles(*GOOD, "--config", "run.toml"), ExitCode.USAGE)
    assert all(f"run.toml:{line}" in message for line in (2, 3, 4))


def test_unknown_flag(miles: Miles) -> None:
    message = refused(miles(*GOOD, "--learning-rate", "1"), ExitCode.USAGE)
    assert "--learning-rate" in message and "miles train --list-flags" in message


def test_missing_run_file(miles: Miles) -> None:
    message = refused(miles(*GOOD, "--config", "nowhere.toml"), ExitCode.USAGE)
    assert "nowhere.toml" in message


def test_missing_data_file(miles: Miles) -> None:
    message = refused(miles(*GOOD, "--prompt-data", "nowhere.jsonl"), ExitCode.REFUSED)
    assert "DAT1" in message
    assert "nowhere.jsonl" in message


def test_inconsistent_four_knobs(miles: Miles) -> None:
    knobs = ("--global-batch-size", "100", "--num-steps-per-rollout", "2")
    message = refused(miles(*GOOD, *knobs), ExitCode.USAGE)
    assert "32 x 8 = 256" in message
    assert "100 x 2 = 200" in message
    assert "leave one of the four out" in message


def test_self_extending_profile(miles: Miles, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = ["b.toml"]\n')
    (tmp_path / "b.toml").write_text('extends = ["a.toml"]\n')
    message = refused(miles("train", "--profile", "./a.toml", "--dry-run"), ExitCode.USAGE)
    assert "extends itself: a -> b -> a" in message


def test_unknown_verb_suggests_one(miles: Miles) -> None:
    done = miles("trian")
    assert done.returncode == ExitCode.USAGE
    assert "Did you mean 'train'?" in done.stderr


def test_errors_are_json_too(miles: Miles) -> None:
    done = miles(*GOOD, "--json", "--prompt-data", "nowhere.jsonl")
    assert done.returncode == ExitCode.REFUSED
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 3
    assert [finding["rule"] for finding in answer["error"]["findings"]] == ["DAT1"]
    assert done.stderr.startswith("error: preflight refused")

    done = miles(*GOOD, "--json", "--lrr", "1")
    problems = json.loads(done.stdout)["error"]["problems"]
    assert [(problem["where"], problem["fix"]) for problem in problems] == [("--lrr", "did you mean --lr?")]


DEFECT = """
import os, signal, sys
import miles_cli.app, miles_cli.main
{before}
def build(argv):
    {does}
miles_cli.app.build = build
miles_cli.main.main()
"""


def with_defect(error: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The program with something broken in it."""
    return that_does(f"raise {error}", before)


def that_does(does: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The program, doing this in place of a verb."""
    source = DEFECT.format(does=does, before=before)
    return subprocess.run(
        [sys.executable, "-c", source, "train"], capture_output=True, text=True, timeout=600
    )


def test_a_defect_is_a_short_message_and_a_traceback_in_a_file() -> None:
    done = with_defect("IndexError('list index out of range')")
    assert done.returncode == ExitCode.FAILED
    assert "unexpected IndexError: list index out of range" in done.stderr
    assert "Traceback" not in done.stderr
    path = Path(done.stderr.split("The traceback is in ")[1].strip())
    assert "Traceback" in path.read_text()
    path.unlink()


def test_the_traceback_of_a_run_goes_into_its_logs(tmp_path: Path) -> None:
    before = f"import pathlib; miles_cli.errors.keep_tracebacks_in(pathlib.Path({str(tmp_path)!r}))"
    done = with_defect("IndexError('x')", before)
    assert str(tmp_path / "traceback.txt") in done.stderr
    assert "IndexError" in (tmp_path / "traceback.txt").read_text()


def test_interrupt_before_anything_started() -> None:
    done = with_defect("KeyboardInterrupt")
    assert done.returncode == ExitCode.INTERRUPTED
    assert done.stderr == ""


def test_terminated_before_anything_started_takes_unfinished_files_away(tmp_path: Path) -> None:
    left = tmp_path / "unfinished"
    done = that_does(
        f"""
    open({str(left)!r}, "w")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    finally:
        os.remove({str(left)!r})"""
    )
    assert (done.returncode, done.stderr) == (ExitCode.TERMINATED, "")
    assert not left.exists()


def test_a_full_disk_is_no_defect() -> None:
    done = with_defect("OSError(28, 'No space left on device', '/data/x')")
    assert done.returncode == ExitCode.FAILED
    assert done.stderr.startswith("error: /data/x: cannot write: No space left on device\n  fix: free space")
    assert "defect" in with_defect("OSError(5, 'Input/output error')").stderr


def test_a_full_disk_under_stdout_is_told_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        say("step 1", full)
        say("step 2", full)
    told = capsys.readouterr().err
    assert told == "output cannot be written any more: No space left on device; the run goes on without it\n"


def test_a_closed_pipe_is_quiet(environment: dict[str, str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "miles_cli", "train", "--list-flags"],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        timeout=600,
    )
    os.close(write)
    assert done.stderr == ""


def test_a_character_that_the_terminal_lacks_is_no_error(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "miles_cli", "--help"],
        capture_output=True,
        env=environment | {"PYTHONIOENCODING": "ascii"},
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"0 ok ? 1 the run" in done.stdout


def test_report_names_what_where_why_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    code = errors.report(RunError("no such run", where="runs/x", why="it was moved", fix="miles runs ls"))
    assert code == ExitCode.FAILED
    assert capsys.readouterr().err == (
        "error: runs/x: no such run\n  why: it was moved\n  fix: miles runs ls\n"
    )
