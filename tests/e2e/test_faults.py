"""Runs that go wrong on purpose: `miles diagnose` names the cause, and nothing of the user's is lost."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
from e2e_support import PATIENCE_S, SMALL, Cli, summary_of

pytestmark = pytest.mark.slow

QUICK = (
    "--profile",
    "quickstart",
    "--skip-eval-before-train",
    "--eval-prompt-data",
    "sort",
    "builtin:sort/test@[0:8]",
)


def diagnosis(cli: Cli, run: Path, exit_code: int) -> list[dict[str, Any]]:
    """The findings of `miles diagnose --json`, whose exit code must be `exit_code`."""
    done = cli("diagnose", str(run), "--json")
    assert done.returncode == exit_code, done.stdout + done.stderr
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return findings


def test_a_nan_in_a_gradient_is_named_with_step_tensor_and_fix(cli: Cli) -> None:
    done = cli("train", *SMALL, "--inject-fault", "nan_grad@10")
    assert done.returncode == 0, "one skipped step does not end a run"
    run = cli.only_run()
    (finding,) = [f for f in diagnosis(cli, run, exit_code=5) if f["rule"] == "NF1"]
    assert finding["step"] == 10 and finding["severity"] == "critical"
    assert "model.layers." in json.dumps(finding["evidence"])
    assert finding["fixes"]
    skipped = [
        row for row in (run / "events" / "driver.jsonl").read_text().splitlines() if "non_finite" in row
    ]
    assert skipped, "the event is in the record"


def test_the_stop_policy_ends_the_run_at_the_first_nan(cli: Cli) -> None:
    done = cli("train", *SMALL, "--inject-fault", "nan_grad@5", "--non-finite-policy", "stop")
    assert done.returncode == 1 and "non-finite" in done.stderr and "Traceback" not in done.stderr
    assert summary_of(cli.only_run())["steps"] == 5
    assert diagnosis(cli, cli.only_run(), exit_code=5)


@pytest.mark.parametrize(("lr", "steps"), [("1e-2", "15"), ("4e-3", "60"), ("3e-3", "40")])
def test_a_learning_rate_that_kills_the_policy_is_named(cli: Cli, lr: str, steps: str) -> None:
    """At 3e-3 the reward collapses with some seeds, with others it never rises: a warning."""
    done = cli("train", *QUICK, "--lr", lr, "--num-rollout", steps)
    assert done.returncode == 0, done.stderr
    run = cli.only_run()
    collapsed = summary_of(run)["alerts"]["critical"] > 0
    assert collapsed or lr == "3e-3"
    found = diagnosis(cli, run, exit_code=5 if collapsed else 0)
    (finding,) = [f for f in found if f["rule"] == ("OP8" if collapsed else "OP11")]
    assert "learning rate" in finding["cause"]
    assert finding["fixes"][0]["patch"]["optimizer.lr"] < float(lr)


@pytest.mark.parametrize("seed", [11, 12, 13, 14, 15])
def test_a_healthy_seed_is_left_alone(cli: Cli, seed: int) -> None:
    done = cli("train", *QUICK, "--seed", str(seed), "--rollout-seed", str(seed))
    assert done.returncode == 0, done.stderr
    assert summary_of(cli.only_run())["alerts"] == {"critical": 0, "warning": 0, "info": 0}
    assert diagnosis(cli, cli.only_run(), exit_code=0) == []


def test_a_malformed_prompt_line_is_reported_by_number_and_counted(cli: Cli, tmp_path: Path) -> None:
    lines = [json.dumps({"input": f"sort {n}=", "label": "".join(sorted(str(n)))}) for n in range(5000, 5200)]
    lines[16] = '{"input": "sort 1234='
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    done = cli("train", *SMALL, "--prompt-data", str(prompts))
    assert done.returncode == 0, done.stderr
    assert "line 17" in done.stderr
    assert summary_of(cli.only_run())["metrics"]["rollout/bad_rows"] == 1


def test_a_reward_function_that_raises_ends_the_run_with_its_place(cli: Cli, tmp_path: Path) -> None:
    hook = tmp_path / "judge.py"
    hook.write_text("def judge(args, sample):\n    return 1 / 0\n")
    done = cli("train", *SMALL, "--custom-rm-path", f"{hook}:judge", "--skip-eval-before-train")
    assert done.returncode == 1 and "judge.py:2" in done.stderr
    assert "division by zero" in done.stderr and "Traceback" not in done.stderr
    assert any("division by zero" in json.dumps(f) for f in diagnosis(cli, cli.only_run(), exit_code=5))


def test_a_full_disk_leaves_the_last_checkpoint_valid(cli: Cli) -> None:
    """A limit on file sizes makes every larger write fail the way a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    assert cli("train", *SMALL, "--num-rollout", "6").returncode == 0
    run = cli.only_run()
    done = cli("runs", "resume", str(run), "--set", "rollout.num_rollout=9", preexec_fn=limit)
    assert done.returncode == 1 and "checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert (run / "checkpoints" / "LATEST").read_text().strip() == "step-000006"
    assert not list((run / "checkpoints").glob(".partial-*"))
    assert cli("runs", "resume", str(run), "--set", "rollout.num_rollout=9").returncode == 0
    assert summary_of(run)["steps"] == 9


def test_a_run_goes_on_when_its_reader_goes_away(cli: Cli) -> None:
    process = cli.start("train", *SMALL, "--skip-eval-before-train")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step")
    process.stdout.close()
    assert process.wait(timeout=PATIENCE_S) == 0
    assert summary_of(cli.only_run())["steps"] == 12
