"""The command line: slime's spellings, and every mistake of a line at once."""

from __future__ import annotations

from typing import Any

import pytest

from miles.config import Kind, fields, find_flag, parse_flags
from miles.errors import ConfigError, ExitCode


def parsed(line: str) -> dict[str, Any]:
    return {item.dotted: item.value for item in parse_flags(line.split())}


@pytest.mark.parametrize(
    ("line", "dotted", "value"),
    [
        ("--lr 5e-7", "optimizer.lr", 5e-7),
        ("--lr=5e-7", "optimizer.lr", 5e-7),
        ("--num-rollout 3000", "rollout.num_rollout", 3000),
        ("--rollout-top-k -1", "rollout.rollout_top_k", -1),
        ("--train-backend megatron", "training.backend", "megatron"),
        ("--run-name 8", "run.name", "8"),
        ("--colocate", "cluster.colocate", True),
        ("--no-colocate", "cluster.colocate", False),
        ("--colocate=false", "cluster.colocate", False),
        ("--no-colocate=false", "cluster.colocate", True),
        ("--no-save-optim", "checkpoint.no_save_optim", True),
        ("--save-optim", "checkpoint.no_save_optim", False),
        ("--disable-rewards-normalization", "algorithm.disable_rewards_normalization", True),
        ("--no-offload-train", "cluster.offload_train", False),
        ("--rollout-stop a b", "rollout.rollout_stop", ("a", "b")),
        ("--rollout-stop-token-ids 1 -2 3", "rollout.rollout_stop_token_ids", (1, -2, 3)),
        ('--apply-chat-template-kwargs {"a":[1]}', "data.apply_chat_template_kwargs", {"a": [1]}),
        ("--sglang-mem-fraction-static 0.6", "sglang.mem_fraction_static", 0.6),
        ("--sglang-enable-metrics", "sglang.enable_metrics", True),
        ("--sglang-tensor-parallel-size 8", "sglang.tensor_parallel_size", 8),
    ],
)
def test_a_flag_sets_its_key(line: str, dotted: str, value: Any) -> None:
    assert parsed(line) == {dotted: value}


def test_a_list_ends_at_the_next_flag() -> None:
    assert parsed("--rollout-stop a b --colocate --eval-prompt-data aime x.jsonl") == {
        "rollout.rollout_stop": ("a", "b"),
        "cluster.colocate": True,
        "eval.eval_prompt_data": ("aime", "x.jsonl"),
    }


def test_of_a_flag_given_twice_the_last_one_counts() -> None:
    assert parsed("--lr 1 --lr 2") == {"optimizer.lr": 2.0}


def test_every_mistake_of_a_line_is_reported_at_once() -> None:
    line = (
        "--lrr 3 --colocate true --adam-beta1 x --rollout-batch-size 0 --n-samples-per-prompt 8.5 stray "
        "--train-env-vars [1] --sglang-mem-fraction-statik 1 --advantage-estimator grop --num-rollout"
    )
    with pytest.raises(ConfigError) as refusal:
        parse_flags(line.split())
    assert refusal.value.exit_code == ExitCode.USAGE
    assert {
        (problem.where, problem.what.split(";")[0][:60], problem.fix) for problem in refusal.value.problems
    } == {
        ("--lrr", "unknown flag", "did you mean --lr?"),
        (
            "--colocate",
            "unexpected word 'true'",
            "--colocate is a switch: write --colocate or --no-colocate, without a value",
        ),
        ("--adam-beta1", "optimizer.adam_beta1 must be a number", ""),
        ("--rollout-batch-size", "rollout.rollout_batch_size must be greater than 0", ""),
        ("--n-samples-per-prompt", "rollout.n_samples_per_prompt must be an integer", ""),
        (
            "8.5",
            "unexpected word 'stray'",
            "every value has a flag before it; `miles train --list-flags` lists them",
        ),
        ("--train-env-vars", "cluster.train_env_vars must be a JSON object", ""),
        ("--sglang-mem-fraction-statik", "unknown flag", "did you mean --sglang-mem-fraction-static?"),
        (
            "--advantage-estimator",
            'algorithm.advantage_estimator must be one of "grpo", "gspo",',
            'did you mean "grpo"?',
        ),
        ("--num-rollout", "needs a value: an integer", ""),
    }


def test_every_field_can_be_set_by_its_flag() -> None:
    words = {Kind.BOOL: [], Kind.INT: ["3"], Kind.FLOAT: ["0.5"], Kind.STR: ["x"], Kind.TABLE: ['{"a": 1}']}
    words |= {Kind.STRINGS: ["x", "y"], Kind.INTEGERS: ["1", "2"]}
    for field in fields():
        values = [field.choices[0]] if field.choices else words[field.kind]
        if field.name in ("eps_clip_c", "async_data_buffer_capacity_factor"):
            values = ["3.0"]
        (assignment,) = parse_flags([field.flag, *values])
        assert assignment.dotted == field.dotted
        if field.negation:
            assert find_flag(field.negation) == (field, False)


def test_a_flag_that_upstream_has_and_miles_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="--lora-rank: unknown flag"):
        parse_flags(["--lora-rank", "8"])


@pytest.mark.parametrize(
    ("word", "fix"), [("quickstart", "--profile quickstart"), ("mine.toml", "--config mine.toml")]
)
def test_a_profile_or_a_run_file_without_its_flag_is_told_the_flag(word: str, fix: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_flags([word])
    assert refusal.value.problems[0].fix.endswith(fix)
