"""`miles diagnose` beside real runs: while they live, when they hang, and through other systems' files."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from e2e_support import SMALL, Cli

from miles.record import RunReader

pytestmark = pytest.mark.slow

LONG = (*SMALL, "--skip-eval-before-train", "--num-rollout", "2000", "--save-interval", "1000")
SLOW_REWARD = """
import time
calls = 0

def judge(args, sample):
    global calls
    calls += 1
    if calls > {after}:
        time.sleep({seconds})
    return float(sample.response == str(sample.label))
"""


def step_of(run: Path) -> int:
    return RunReader(run).history.last_step or 0


def findings(cli: Cli, target: Path, exit_code: int, *options: str) -> dict[str, Any]:
    """The whole JSON report."""
    done = cli("diagnose", str(target), "--json", *options)
    assert done.returncode == exit_code, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_live_setting_is_changed_by_command_and_the_next_step_uses_it(cli: Cli) -> None:
    process = cli.start("train", *LONG, "--lr-warmup-iters", "0")
    cli.wait_until(lambda: bool(list(cli.runs.glob("*/events/driver.jsonl"))), process)
    run = cli.only_run()
    cli.wait_until(lambda: step_of(run) >= 2, process)
    done = cli("runs", "set", str(run), "optimizer.lr=1.5e-5", "--wait")
    assert done.returncode == 0 and "applied" in done.stdout, done.stderr
    changed = RunReader(run).events("control")[-1]
    cli.wait_until(lambda: RunReader(run).series("train/lr").last == 1.5e-5, process)
    assert changed["patch"] == {"optimizer.lr": 1.5e-5} and changed["by"] == "cli"
    refused = cli("runs", "set", str(run), "algorithm.kl_loss_coef=0.1", "--wait")
    assert refused.returncode == 1 and "no reference model" in refused.stderr + refused.stdout
    process.send_signal(signal.SIGTERM)
    cli.outcome(process)
    assert process.returncode == 143


def test_the_stacks_of_a_waiting_run_name_the_line_and_leave_it_alone(cli: Cli, tmp_path: Path) -> None:
    hook = tmp_path / "judge.py"
    hook.write_text(SLOW_REWARD.format(after=100, seconds=1000))
    process = cli.start("train", *LONG, "--custom-rm-path", f"{hook}:judge")
    cli.wait_until(lambda: bool(list(cli.runs.glob("*/events/driver.jsonl"))), process)
    run = cli.only_run()
    cli.wait_until(lambda: step_of(run) >= 3, process)
    report = findings(cli, run, 0, "--stacks")
    (stack,) = report["stacks"]
    assert stack["pid"] and "judge" in stack["text"], stack
    assert "rollout of step 4" in report["last_phase"]
    assert process.poll() is None


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        ("stale_engine@4", "MM6"),
        ("skip_sync@4", "SY17"),
        ("corrupt_routes@4", "RT3"),
        ("drop_routes@4", "RT1"),
    ],
)
def test_a_fault_of_the_engine_is_the_first_thing_told(cli: Cli, fault: str, first: str) -> None:
    done = cli("train", *SMALL, "--skip-eval-before-train", "--inject-fault", fault)
    assert done.returncode == 0, done.stderr
    assert findings(cli, cli.only_run(), 5)["findings"][0]["rule"] == first


def test_the_event_files_of_a_run_tell_what_its_record_tells(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    done = cli("train", *SMALL, "--skip-eval-before-train", "--inject-fault", "corrupt_routes@4")
    assert done.returncode == 0, done.stderr
    target = tmp_path / "tb"
    assert cli("export", str(cli.only_run()), "--to", "tensorboard", "--out", str(target)).returncode == 0
    report = findings(cli, target, 5)
    assert report["source"] == "TensorBoard files of miles / slime" and report["step"] == 12
    own = {f["rule"] for f in findings(cli, cli.only_run(), 5)["findings"]}
    assert {f["rule"] for f in report["findings"]} & own >= {"RT3", "MM6"}


def test_a_bundle_of_a_failed_run_holds_no_name_of_the_user(cli: Cli, tmp_path: Path) -> None:
    hook = tmp_path / "judge.py"
    hook.write_text("def judge(args, sample):\n    return 1 / 0\n")
    assert (
        cli("train", *SMALL, "--skip-eval-before-train", "--custom-rm-path", f"{hook}:judge").returncode == 1
    )
    bundle = tmp_path / "bundle.tar.gz"
    done = cli("diagnose", "last", "--bundle", str(bundle))
    assert done.returncode == 5 and "report.md" in done.stderr and bundle.stat().st_size > 0
