"""A run that was cut off and resumed is the run that was not cut off."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from e2e_support import NAMING_A_CHECKPOINT, RECORDING_A_STEP, SMALL, Cli, metrics_of, summary_of
from preloaded import Pause

from miles.record import RunReader

pytestmark = pytest.mark.slow


def steps_recorded(cli: Cli) -> int:
    """The last step that the only run has recorded; 0 while there is none."""
    runs = list(cli.runs.glob("*/events/driver.jsonl"))
    return max((row.step for run in runs for row in RunReader(run.parent.parent).rows()), default=0)


def test_the_same_seed_gives_the_same_metrics(cli: Cli, uninterrupted: Path) -> None:
    assert cli("train", *SMALL).returncode == 0
    assert metrics_of(cli.only_run()) == metrics_of(uninterrupted)


def test_another_seed_gives_other_metrics(cli: Cli, uninterrupted: Path) -> None:
    assert cli("train", *SMALL, "--rollout-seed", "43").returncode == 0
    assert metrics_of(cli.only_run()) != metrics_of(uninterrupted)


@pytest.mark.parametrize("step", [0, 1, 4, 8, 11])
def test_a_run_killed_at_any_step_resumes_exactly(cli: Cli, uninterrupted: Path, step: int) -> None:
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=step + 1), "train", *SMALL)
    assert steps_recorded(cli) == step
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = cli("runs", "resume", str(cli.only_run()))
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(cli.only_run()) == metrics_of(uninterrupted)
    assert summary_of(cli.only_run())["steps"] == 12


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_exactly(cli: Cli, uninterrupted: Path) -> None:
    process = cli.start_until(Pause(*NAMING_A_CHECKPOINT, call=2), "train", *SMALL)
    (partial,) = cli.only_run().glob("checkpoints/.partial-*")
    assert partial.name.startswith(".partial-step-000006-")
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = cli("runs", "resume", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics_of(cli.only_run()) == metrics_of(uninterrupted)


def test_sigterm_finishes_the_step_saves_and_resumes_exactly(cli: Cli, uninterrupted: Path) -> None:
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=5), "train", *SMALL)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, stderr = cli.outcome(process)
    assert process.returncode == 143, stderr
    assert "stopping at the end of this step, with a checkpoint" in stderr
    run = cli.only_run()
    stopped = summary_of(run)
    assert stopped["status"] == "interrupted" and stopped["steps"] == 5
    assert (run / "checkpoints" / f"step-{stopped['steps']:06d}").is_dir()
    assert cli("runs", "resume", run.name).returncode == 0
    assert metrics_of(run) == metrics_of(uninterrupted)


def test_a_second_kill_after_a_resume_is_no_different(cli: Cli, uninterrupted: Path) -> None:
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=6), "train", *SMALL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = cli.only_run()
    process = cli.start_until(Pause(*RECORDING_A_STEP, call=5), "runs", "resume", str(run))
    assert RunReader(run).attempt == 2 and steps_recorded(cli) == 7
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cli("runs", "resume", str(run)).returncode == 0
    assert metrics_of(run) == metrics_of(uninterrupted)
    assert RunReader(run).attempt == 3


@pytest.fixture
def finished(cli: Cli, uninterrupted: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(uninterrupted, cli.runs / uninterrupted.name))


def test_a_complete_run_is_not_run_again(cli: Cli, finished: Path) -> None:
    done = cli("runs", "resume", str(finished))
    assert done.returncode == 1 and "complete" in done.stderr and "num_rollout" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_goes_on_with_more_steps(cli: Cli, finished: Path) -> None:
    done = cli("runs", "resume", str(finished), "--set", "rollout.num_rollout=14")
    assert done.returncode == 0, done.stderr
    assert summary_of(finished)["steps"] == 14


def test_a_run_goes_on_from_a_converted_step(cli: Cli, finished: Path, uninterrupted: Path) -> None:
    """Its sixth step, through a distributed checkpoint and back; the rest of the run is the same."""
    step = finished / "checkpoints" / "step-000006"
    there, back = finished.parent / "dcp", finished.parent / "back"
    for words in ((step, there, "--to", "dcp"), (there, back, "--to", "native")):
        done = cli("convert", *map(str, words))
        assert done.returncode == 0, done.stderr
    shutil.rmtree(step)
    back.rename(step)
    shutil.rmtree(there)
    done = cli("runs", "resume", str(finished), "--from-step", "6")
    assert done.returncode == 0, done.stderr
    assert metrics_of(finished) == metrics_of(uninterrupted)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(cli: Cli, finished: Path, damage: str) -> None:
    weights = finished / "checkpoints" / "step-000012" / "trainer" / "model" / "model.safetensors"
    content = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    else:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    more = ("--set", "rollout.num_rollout=13")
    done = cli("runs", "resume", str(finished), *more)
    assert done.returncode == 1 and "model.safetensors" in done.stderr and damage in done.stderr
    assert "Traceback" not in done.stderr
    assert cli("runs", "resume", str(finished), "--from-step", "9", *more).returncode == 0
