"""Cluster runs checked on a laptop: reported misconfigurations are refused or warned of in under a second.

Each line is the cluster profile with one mistake. As in `test_startup.py`, the budget is compared with the
processor time of the cheapest of several starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

Miles = Callable[..., "subprocess.CompletedProcess[str]"]

PLAN = ("train", "--profile", "qwen3-moe-fp8", "--dry-run", "--assume-hardware")
BUDGET_S = 1.0
STARTS = 10
"""A start that kept the budget settles it; others may have met a busy machine."""

MISTAKES = {
    # rule: (hardware, flags, a word of the message)
    "LAY1": ("16xH100", "--pipeline-model-parallel-size 3", "nearest layout that works"),
    "LAY5": ("16xH100", "--tensor-model-parallel-size 4", "--sequence-parallel"),
    "LAY6": (
        "16xH100",
        "--tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 1",
        "drift apart",
    ),
    "GPU1": ("8xH100", "", "2 x 8 for the trainer"),
    "GPU4": ("16xH100", "--rollout-num-gpus 8", "8 GPUs sample, 16 train"),
    "MEM3": ("16xL40S", "", "largest part is"),
    "MEM5": ("16xH100", "--sglang-mem-fraction-static 0.02", "raise --sglang-mem-fraction-static"),
    "MEM7": ("16xH100", "--max-tokens-per-gpu 8192", "10,240 tokens at most"),
    "CAP4": ("16xA100", "", "it needs sm100 or sm90"),
    "FP1": ("16xB200", "--fp8-block-scale fp32", "takes pow2"),
    "I41": ("16xH100", "--set precision.fp8_format=default --set precision.fp8_recipe=default "
            "--rollout-format int4", "--int4-qat"),
    "PRC2": ("16xH100", "--set precision.fp8_format=default --set precision.fp8_recipe=default "
             "--set correction.use_tis=default", "--fp8-format e4m3"),
    "PRC6": ("16xH100", "--transformer-impl local", "Transformer Engine"),
    "PRC8": ("16xH100", "--sglang-expert-parallel-size 1", "not a multiple of 128"),
    "ALN3": ("16xH100", "--sglang-enable-return-routed-experts=false", "routes"),
    "ALN5": ("16xH100", "--sglang-speculative-algorithm NGRAM", "0.022"),
    "SPC2": ("16xH100", "--mtp-num-layers 1 --enable-mtp-training --context-parallel-size 2", "CP 2"),
    "SPC3": ("16xH100", "--sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 3 "
             "--sglang-speculative-num-draft-tokens 9", "num-draft-tokens 4"),
    "SMP1": ("16xH100", "--rollout-temperature 0", "--rollout-temperature 1.0"),
    "MOE1": ("16xH100", "--moe-aux-loss-coeff 0.001", "--moe-aux-loss-coeff 0"),
    "CKP1": ("16xH100", "--load runs/a/checkpoints/step-000020 --start-rollout-id 3", "ends at 20"),
    "FTL1": ("16xH100", "--use-fault-tolerance", "first-wait 300"),
    "LRN1": ("16xH100", "--lr 1e-4", "lr 0.0001"),
}  # fmt: skip


@pytest.mark.parametrize("rule", MISTAKES)
def test_a_mistake_is_said_with_its_rule_cause_and_next_step(miles: Miles, rule: str) -> None:
    hardware, flags, word = MISTAKES[rule]
    done = miles(*PLAN, hardware, *flags.split(), "--json")
    told = json.loads(done.stdout)
    found = {finding["rule"]: finding for finding in (told.get("plan") or told["error"])["findings"]}
    assert rule in found, sorted(found)
    errors = [finding for finding in found.values() if finding["severity"] == "error"]
    assert done.returncode == (3 if errors else 0), done.stderr
    assert found[rule]["cause"] and found[rule]["fix"]
    assert word in json.dumps(found[rule])


def test_the_profile_itself_passes_and_says_that_it_is_wired_only(miles: Miles) -> None:
    done = miles(*PLAN, "16xH100", "--json")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)["plan"]["findings"]
    assert {finding["rule"] for finding in findings} == {"CAP6", "ASM1"}
    assert "wired only" in next(f["title"] for f in findings if f["rule"] == "CAP6")


def test_the_arithmetic_of_a_refused_run_is_shown(miles: Miles) -> None:
    done = miles(*PLAN, "16xH100", "--attention-dropout", "0.1")
    assert done.returncode == 3
    assert "2 nodes of 8 H100 (79.6 GiB each)" in done.stdout
    assert "TP 1 x PP 4 x CP 1 x DP 4 · experts EP 4 x ETP 1 x DP 1" in done.stdout
    for phase in ("rollout", "log-probs", "training", "weight sync"):
        assert f"memory    {phase}: " in done.stdout
    assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1" in done.stdout
    assert "error CAP2" in done.stderr
    assert "error CAP2" not in done.stdout


def test_the_arithmetic_is_json_too(miles: Miles) -> None:
    outline = json.loads(miles(*PLAN, "2x8xB200", "--json").stdout)["plan"]["outline"]
    assert outline["placement"]["total_gpus"] == 16
    assert outline["layout"]["dp"] == 4
    assert outline["exports"]["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == "0"
    training = next(phase for phase in outline["phases"] if phase["name"] == "training")
    assert training["total_bytes"] == sum(part["bytes"] for part in training["parts"])


def test_without_assumed_hardware_the_laptop_is_the_machine(miles: Miles) -> None:
    done = miles(*PLAN[:-1])
    assert done.returncode == 3
    assert "GPU1" in done.stderr or "16 GPUs" not in done.stderr
    assert "DAT1" in done.stderr, "files of this machine count"


def test_assumed_hardware_is_for_planning_alone(miles: Miles) -> None:
    done = miles("train", "--profile", "quickstart", "--assume-hardware", "16xH100")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_words_that_name_no_hardware(miles: Miles) -> None:
    done = miles(*PLAN, "16xH101")
    assert done.returncode == 2
    assert "did you mean H100?" in done.stderr


def test_a_cpu_run_can_be_planned_for_another_machine(miles: Miles) -> None:
    done = miles("train", "--profile", "quickstart", "--dry-run", "--assume-hardware", "cpu")
    assert done.returncode == 0, done.stderr
    assert "info ASM1" in done.stdout


def keeps_budget(environment: dict[str, str], *words: str) -> bool:
    """Whether one of several starts takes fewer processor seconds than the budget."""
    for _ in range(STARTS):
        command = [sys.executable, "-m", "miles_cli", *words]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 3
        if usage.ru_utime + usage.ru_stime < BUDGET_S:
            return True
    return False


@pytest.mark.parametrize("rule", ["LAY1", "MEM3", "CAP4"])
def test_a_refusal_takes_under_a_second(environment: dict[str, str], rule: str) -> None:
    """The first two search for the nearest layout, which is the slowest thing that preflight does."""
    hardware, flags, _ = MISTAKES[rule]
    assert keeps_budget(environment, *PLAN, hardware, *flags.split())


def test_a_thousand_gpus_are_planned_in_the_same_time(environment: dict[str, str]) -> None:
    words = (*PLAN, "1024xH100", "--model-name", "qwen3-235b-a22b", "--actor-num-nodes", "128")
    sizes = ("--pipeline-model-parallel-size", "3", "--rollout-batch-size", "1024")
    assert keeps_budget(environment, *words, *sizes)
