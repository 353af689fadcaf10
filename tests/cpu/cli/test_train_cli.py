"""`miles train`: the plan of a dry run, the launch lines of the world around us, and the lines of a run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from miles.config import find_flag
from miles.record import RecordWriter, RunLayout, Summary
from miles_cli.run_view import RunView
from miles_cli.step_line import step_line
from miles_cli.summary_view import summary_lines
from miles_cli.units import binary_bytes, count, duration, rate

Miles = Callable[..., "subprocess.CompletedProcess[str]"]

LAUNCH_LINES = {
    "policy": "--advantage-estimator grpo --model-name qwen3-30b-a3b --hf-checkpoint DIR "
    "--rollout-batch-size 512 --n-samples-per-prompt 8",
    "placement": "--actor-num-nodes 1 --actor-num-gpus-per-node 8 --rollout-num-gpus 8 "
    "--rollout-num-gpus-per-engine 2 --colocate",
    "parallelism": "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 4",
    "data": "--prompt-data FILE.jsonl --num-rollout 3000",
    "speculation": "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 "
    "--sglang-speculative-eagle-topk 1 --sglang-speculative-num-draft-tokens 4 "
    "--sglang-speculative-draft-model-path DIR --sglang-enable-draft-weights-cpu-backup",
    "draft training": "--mtp-num-layers 1 --enable-mtp-training --mtp-loss-scaling-factor 0.2",
    "correction": "--use-tis --tis-threshold 0.9 --lr 5e-7",
}
HARDWARE = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def test_dry_run_prints_the_plan_and_starts_nothing(miles: Miles, tmp_path: Path) -> None:
    done = miles("train", "--profile", "quickstart", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "226,112 parameters" in done.stdout
    assert "80 × (32 prompts × 8 samples = 256)" in done.stdout
    assert "1 thread per process" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_an_exact_run_says_what_start_up_will_find(miles: Miles) -> None:
    plan = ("train", "--profile", "quickstart", "--dry-run")
    assert "trainer and engine bit for bit alike" in miles(*plan, "--true-on-policy-mode").stdout
    assert "bit for bit" not in miles(*plan).stdout


def test_dry_run_json_holds_plan_and_config(miles: Miles) -> None:
    done = miles("train", "--profile", "quickstart", "--dry-run", "--json", "--lr", "2e-4")
    answer = json.loads(done.stdout)
    assert answer["plan"]["num_rollouts"] == 80
    assert answer["plan"]["findings"] == []
    assert answer["config"]["values"]["optimizer"]["lr"] == 2e-4


def test_flags_run_file_and_set_reach_the_plan_in_their_order(miles: Miles, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[rollout]\nnum_rollout = 7\nrollout_batch_size = 16\n")
    words = (
        "--config",
        "run.toml",
        "--rollout-batch-size",
        "8",
        "--set",
        "run.threads=1",
        "--rollout-top-k",
        "-1",
    )
    done = miles("train", "--profile", "quickstart", *words, "--dry-run", "--json")
    plan = json.loads(done.stdout)["plan"]
    assert (plan["num_rollouts"], plan["batch"]["rollout_batch_size"]) == (7, 8)
    assert plan["threads"] == {"count": 1, "rule": "run.threads"}


@pytest.mark.parametrize(
    "line", [*LAUNCH_LINES.values(), " ".join(LAUNCH_LINES.values())], ids=[*LAUNCH_LINES, "all"]
)
def test_launch_lines_are_planned_or_refused_with_rule_ids(miles: Miles, line: str) -> None:
    done = miles("train", "--profile", "quickstart", *line.split(), "--dry-run", "--json", **HARDWARE)
    assert done.returncode in (0, 3), done.stderr
    answer = json.loads(done.stdout)
    if done.returncode == 3:
        assert all(finding["rule"] for finding in answer["error"]["findings"])
    else:
        assert answer["plan"]["num_rollouts"] > 0


def test_own_options_of_train_are_not_settings() -> None:
    for option in ("--profile", "--config", "--set", "--dry-run", "--json", "--quiet", "--list-flags"):
        assert find_flag(option) is None


def test_list_flags_explains_every_setting(miles: Miles) -> None:
    lines = miles("train", "--list-flags").stdout.splitlines()
    assert "[optimizer]" in lines
    assert any(line.startswith("  --lr (float): Peak learning rate") for line in lines)


ROW = {
    "step": 7,
    "total": 80,
    "metrics": {
        "rollout/raw_reward": 0.5,
        "train/train_rollout_logprob_abs_diff": 2.5e-7,
        "train/grad_norm": 1.25,
        "perf/tokens_per_sec": 24_100.0,
        "perf/step_time": 0.2,
        "perf/rollout_time": 0.05,
        "perf/train_time": 0.15,
    },
}


def test_step_line() -> None:
    assert step_line(ROW) == (
        "step  7/80  reward 0.500  gap 2.5e-07  grad 1.25  24.1k tok/s  0.20 s  rollout 25%  train 75%"
    )


def test_step_line_drops_parts_to_fit_a_terminal() -> None:
    assert step_line(ROW, width=40) == "step  7/80  reward 0.500  gap 2.5e-07"


def test_a_skipped_step_says_so() -> None:
    row = {"step": 1, "total": 2, "metrics": {"train/step_skipped": 1.0}}
    assert step_line(row) == "step 1/2  SKIPPED: non-finite"


def test_lines_go_to_stdout_and_talk_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    view = RunView()
    view.on_event("stage", {"name": "warm start", "state": "start", "total": 250})
    view.on_event("eval", {"step": 0, "eval/sort": 0.361, "eval/sort-truncated_ratio": 0.1})
    view.on_step(ROW)
    view.on_event("alert", {"step": 7, "rule": "MM1", "severity": "warning", "title": "the gap grows"})
    captured = capsys.readouterr()
    assert captured.out == step_line(ROW) + "\n"
    assert captured.err.splitlines() == [
        "warm start: 250 steps, once; kept for later runs",
        "eval at step 0: sort 0.361",
        "warning MM1: step 7: the gap grows  (miles diagnose --explain MM1)",
    ]


def test_json_is_one_object_per_step_and_keeps_non_finite_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    view = RunView(as_json=True)
    view.on_step({"step": 1, "total": 2, "metrics": {"train/loss": float("nan")}})
    line = json.loads(capsys.readouterr().out)
    assert line["metrics"] == {"train/loss": "nan"}
    assert line["nonfinite"] == [["metrics", "train/loss"]]


def test_quiet_still_says_alerts(capsys: pytest.CaptureFixture[str]) -> None:
    view = RunView(quiet=True)
    view.on_step(ROW)
    view.on_event("checkpoint", {"step": 7, "path": "x"})
    view.on_event("non_finite", {"step": 7, "tensor": "model.norm.weight", "what": "gradient", "count": 3})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "non-finite: step 7: 3 values in gradient of model.norm.weight\n"


def test_no_progress_bar_and_no_escape_code_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with RunView().live() as view:
        view.on_step(ROW)
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err


def summary(status: str = "finished") -> Summary:
    return Summary(
        status=status,
        attempt=1,
        steps=80,
        seconds=12.0,
        reward_first5=0.4,
        reward_last5=0.9,
        eval_before={"sort": {"sampled": 0.361, "greedy": 0.949}},
        eval_after={"sort": {"sampled": 0.926, "greedy": 0.977}},
        metrics={},
        alerts={"critical": 0, "warning": 2, "info": 0},
        config_hash="0",
    )


def test_last_words_of_a_run(tmp_path: Path) -> None:
    RunLayout(tmp_path).make()
    with RecordWriter(tmp_path) as record:
        for step in range(1, 11):
            record.metrics(step, {"rollout/raw_reward": step / 10})
    lines = list(summary_lines(tmp_path, summary()))
    assert lines[0] == "finished: 80 steps in 12 s"
    assert lines[1] == "reward: 0.400 in the first five steps, 0.900 in the last five"
    chart = lines[2 : lines.index("held out, sort: sampled 0.361 -> 0.926; greedy 0.949 -> 0.977")]
    assert len(chart) == 8
    assert max(map(len, chart)) <= 80
    assert "alerts: 2 warning" in lines
    assert f"run: {tmp_path}" in lines
    assert any(f"miles watch {tmp_path}" in line for line in lines)


def test_a_run_with_alerts_is_told_what_they_mean_first(tmp_path: Path) -> None:
    ended = replace(summary(), reward_first5=None, reward_last5=None)
    with RecordWriter(tmp_path):
        lines = list(summary_lines(tmp_path, ended))
    after = lines[lines.index("next:") + 1 :]
    assert after[0].endswith("# what the alerts mean, and what to change")


def test_a_failed_run_is_told_how_to_go_on(tmp_path: Path) -> None:
    ended = replace(summary("failed"), reward_first5=None, reward_last5=None)
    with RecordWriter(tmp_path) as record:
        lines = "\n".join(summary_lines(tmp_path, ended))
        assert f"miles diagnose {tmp_path}  # why it ended" in lines
        assert f"miles runs resume {tmp_path}  # start again: there is no checkpoint yet" in lines
        record.event("checkpoint", step=20, path="checkpoints/step-000020")
        assert "# go on after step 20" in "\n".join(summary_lines(tmp_path, ended))


def test_what_is_said_without_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    alert = {"rule": "DA1", "severity": "warning", "title": "Rows", "step": None}
    RunView().on_event("alert", alert)
    RunView(quiet=True).on_event("stopping", {})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning DA1: Rows  (miles diagnose --explain DA1)"
    assert second.startswith("stopping at the end of this step, with a checkpoint; once more: now")


def test_units() -> None:
    assert (count(1, "step"), count(1200, "step")) == ("1 step", "1,200 steps")
    assert (binary_bytes(1023), binary_bytes(1536)) == ("1023 B", "1.5 KiB")
    assert (rate(999), rate(24_100)) == ("999", "24.1k")
    assert (duration(0.31), duration(47.2), duration(200)) == ("0.31 s", "47 s", "3 min 20 s")
    assert duration(7500) == "2 h 05 min"
