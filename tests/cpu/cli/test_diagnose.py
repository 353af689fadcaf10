"""`miles diagnose`: evidence, cause, a fix as a diff, and exit codes a script can use."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from miles.errors import ConfigError, ExitCode, RunError
from miles.record import History, RecordWriter, RunStatus, summarise, write_summary
from miles_cli.app import build
from miles_cli.commands.runs import complete_run

CONFIG = {"values": {"optimizer": {"lr": 0.003}, "rollout": {"rollout_max_response_len": 12}}, "origins": {}}


@pytest.fixture(autouse=True)
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILES_RUNS_DIR", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def write_run(path: Path, rewards: list[float], status: RunStatus = RunStatus.FINISHED) -> Path:
    """A run whose groups die with its reward; a checkpoint at step 4."""
    history = History()
    with RecordWriter(path, history=history) as writer:
        for step, reward in enumerate(rewards, start=1):
            active = 0.9 if reward > 0.2 else 0.05
            writer.metrics(
                step,
                {
                    "rollout/raw_reward": reward,
                    "train/active_group_fraction": active,
                    "train/grad_norm": 2.0,
                },
            )
            if step == 4:
                writer.event("checkpoint", step=4, path="checkpoints/step-000004")
        write_summary(path, summarise(history, status, 1.0, "c0ffee"))
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


COLLAPSE = [0.34, 0.33, 0.35, 0.34, 0.33, 0.28, 0.22, 0.17, 0.13, 0.1, 0.06, *[0.01] * 17]
HEALTHY = [0.3 + 0.02 * step for step in range(30)]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(build(list(arguments)), list(arguments))


def test_a_collapsed_run_is_explained_with_a_diff_and_a_command(runs_dir: Path) -> None:
    run = write_run(runs_dir / "bad", COLLAPSE)
    result = invoke("diagnose", "bad")
    assert result.exit_code == ExitCode.CRITICAL
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert lines[0] == "bad: finished, 28 steps"
    assert "◆ critical OP8 Reward collapse (step 5)" in lines
    assert any("learning rate too high (0.003)" in line for line in lines)
    assert any("active groups fell from 90% to 5%" in line for line in lines)
    at = lines.index("[optimizer]")
    assert lines[at + 1 : at + 3] == ["- lr = 0.003", "+ lr = 3e-4"]
    assert f"$ miles runs resume {run} --from-step 4 --set optimizer.lr=3e-4" in lines
    assert result.stderr == ""


def test_json_holds_findings_fixes_diffs_and_commands(runs_dir: Path) -> None:
    write_run(runs_dir / "bad", COLLAPSE)
    result = invoke("diagnose", "bad", "--json")
    assert result.exit_code == ExitCode.CRITICAL
    report = json.loads(result.stdout)
    assert (report["run_id"], report["status"], report["exit_code"]) == ("bad", "finished", 5)
    (finding,) = report["findings"]
    assert (finding["rule"], finding["severity"], finding["tier"]) == ("OP8", "critical", "tuning")
    assert finding["evidence"][0]["metric"] == "rollout/raw_reward" and finding["evidence"][0]["points"]
    (fix,) = finding["fixes"]
    assert fix["patch"] == {"optimizer.lr": 3e-4} and fix["kind"] == "resume"
    assert "+ lr = 3e-4" in fix["diff"] and fix["command"].startswith("miles runs resume")


def test_a_healthy_run_exits_0_and_says_so(runs_dir: Path) -> None:
    write_run(runs_dir / "good", HEALTHY)
    result = invoke("diagnose")
    assert result.exit_code == ExitCode.OK
    assert "nothing found" in result.stdout


def test_non_finite_values_survive_into_json(runs_dir: Path) -> None:
    with RecordWriter(runs_dir / "nan") as writer:
        writer.metrics(1, {"train/loss": math.nan})
    report = json.loads(invoke("diagnose", "nan", "--json").stdout)
    assert report["findings"][0]["rule"] == "NF1"


def test_an_injected_fault_is_named_with_step_tensor_and_the_way_back(runs_dir: Path) -> None:
    run = write_run(runs_dir / "nan", HEALTHY)
    values = {**CONFIG["values"], "debug": {"inject_fault": "nan_grad@10"}}
    (run / "config.json").write_text(json.dumps({"values": values, "origins": {}}))
    with RecordWriter(run) as writer:
        writer.event("non_finite", step=10, tensor="model.layers.1.mlp.gate.weight", what="gradient", count=1)
        write_summary(run, summarise(History(), RunStatus.FAILED, 1.0, "c0ffee"))
    result = invoke("diagnose", "nan")
    assert result.exit_code == ExitCode.CRITICAL
    assert "NF1 Non-finite gradient at step 10: model.layers.1.mlp.gate.weight" in result.stdout
    assert '- inject_fault = "nan_grad@10"' in result.stdout
    assert "+ inject_fault" not in result.stdout
    assert f"$ miles runs resume {run} --from-step 4 --set debug.inject_fault=default" in result.stdout


def test_the_latest_run_is_meant_when_none_is_named(runs_dir: Path) -> None:
    write_run(runs_dir / "one", HEALTHY)
    write_run(runs_dir / "two", COLLAPSE)
    assert invoke("diagnose").stdout.startswith("two:")
    assert invoke("diagnose", "last").stdout.startswith("two:")


def test_a_run_that_does_not_exist_is_one_message_with_a_suggestion(runs_dir: Path) -> None:
    write_run(runs_dir / "quick-1", HEALTHY)
    result = invoke("diagnose", "qiuck-1")
    assert isinstance(result.exception, RunError) and result.exception.exit_code == ExitCode.FAILED
    assert "did you mean quick-1?" in str(result.exception)


def test_a_rule_is_explained_without_a_run() -> None:
    result = invoke("diagnose", "--explain", "mm6")
    assert result.exit_code == ExitCode.OK
    assert result.stdout.startswith("MM6: Log-prob gap")
    assert "gap_warn = 0.03" in result.stdout and "M#1186" in result.stdout
    assert json.loads(invoke("diagnose", "--explain", "MM6", "--json").stdout)["rule"] == "MM6"


def test_an_unknown_rule_is_a_usage_error_that_lists_the_rules() -> None:
    result = invoke("diagnose", "--explain", "MM99")
    assert isinstance(result.exception, ConfigError) and result.exception.exit_code == ExitCode.USAGE
    assert "MM6" in str(result.exception)


def test_a_symptom_that_is_not_evaluated_says_what_is_missing() -> None:
    result = invoke("diagnose", "--explain", "SY6")
    assert isinstance(result.exception, RunError) and "KV usage" in str(result.exception)


def test_markdown_is_for_an_issue(runs_dir: Path) -> None:
    write_run(runs_dir / "bad", COLLAPSE)
    result = invoke("diagnose", "bad", "--markdown")
    assert result.exit_code == ExitCode.CRITICAL
    assert "### critical OP8: Reward collapse (step 5)" in result.stdout
    assert "```diff\n  [optimizer]\n- lr = 0.003\n+ lr = 3e-4\n```" in result.stdout


def test_bare_logs_are_diagnosed_without_a_run(runs_dir: Path) -> None:
    log = runs_dir / "worker.log"
    log.write_text('step 1\nTraceback (most recent call last):\n  File "a.py", line 1, in f\nKeyError: 3\n')
    for target in (log, runs_dir):
        result = invoke("diagnose", str(target))
        assert result.exit_code == ExitCode.CRITICAL, result.output
        assert "EX1 worker.log raised KeyError" in result.stdout and "Last words:" in result.stdout
        assert "miles runs resume" not in result.stdout, "there is no run of ours to resume"
    assert json.loads(invoke("diagnose", str(log), "--json").stdout)["source"] == "logs"


def test_a_path_without_anything_to_read_says_what_was_looked_for(runs_dir: Path) -> None:
    result = invoke("diagnose", str(runs_dir))
    assert isinstance(result.exception, RunError) and "TensorBoard" in str(result.exception)


def test_a_bundle_is_written_listed_and_does_not_change_the_exit_code(runs_dir: Path) -> None:
    write_run(runs_dir / "bad", COLLAPSE)
    bundle = runs_dir / "b.tar.gz"
    result = invoke("diagnose", "bad", "--bundle", str(bundle))
    assert result.exit_code == ExitCode.CRITICAL and bundle.stat().st_size > 0
    for name in ("config.json", "events/driver.jsonl", "report.md", "environment.json"):
        assert name in result.stderr
    assert "samples" in result.stderr, "it says what was left out"


def test_the_surroundings_are_printed_without_a_run() -> None:
    result = invoke("diagnose", "--env")
    assert result.exit_code == ExitCode.OK and "torch" in result.stdout
    assert set(json.loads(invoke("diagnose", "--env", "--json").stdout)) >= {
        "versions",
        "machine",
        "variables",
    }


def test_a_running_run_gets_a_live_fix_with_the_command_that_applies_it(runs_dir: Path) -> None:
    run = runs_dir / "live"
    with RecordWriter(run) as writer:
        for step in range(1, 16):
            writer.metrics(step, {"train/pg_clipfrac": 0.7 if step > 1 else 0.0})
        (run / "config.json").write_text(json.dumps(CONFIG))
        result = invoke("diagnose", "live")
    assert "(live)" in result.stdout
    assert f"$ miles runs set {run} optimizer.lr=0.001" in result.stdout


def test_stacks_of_live_workers_are_dumped_on_request(runs_dir: Path) -> None:
    with RecordWriter(runs_dir / "live") as writer:
        writer.metrics(1, {"rollout/raw_reward": 0.5})
        result = invoke("diagnose", "live", "--stacks")
    assert result.exit_code == ExitCode.OK
    assert "Stack of driver (process" in result.stdout


def test_run_ids_complete(runs_dir: Path) -> None:
    write_run(runs_dir / "quick-1", HEALTHY)
    assert complete_run("qu") == ["last", "quick-1"]
