"""`miles train --true-on-policy-mode`: the gap is exactly 0 on every token of every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_support import SMALL, Cli

from miles.arch.shrink import small_config
from miles.arch.specs import shipped_spec
from miles.data.tasks import sort
from miles.orchestration.small_model import make_small_model
from miles.planning.facts.compiler import read_compiler
from miles.record import RunReader
from miles.weights.hf import copy_companions

pytestmark = pytest.mark.slow

ZERO = (
    "train/train_rollout_logprob_abs_diff",
    "train/train_rollout_logprob_abs_diff_max",
    "train/train_rollout_kl",
    "train/ratio_gt2_frac",
    "train/ppo_kl",
    "train/pg_clipfrac",
    "route/flip_frac",
)
FAMILIES = ("deepseek-v3.2", "gemma-2-2b", "gemma-3-1b", "gemma-3n-e2b", "llama-4-scout-17b-16e")
"""A shipped architecture of each family that does not attend to all that is before, or caps its scores."""


@pytest.mark.parametrize(
    ("dtype", "steps", "flags"),
    [("fp32", 100, ()), ("fp32", 12, ("--decode-kernel", "torch")), ("bf16", 12, ())],
    ids=["fp32", "fp32 in torch", "bf16"],
)
def test_every_step_of_a_run_is_exactly_on_policy(
    dtype: str, steps: int, flags: tuple[str, ...], cli: Cli
) -> None:
    compiled = read_compiler() is not None and not flags
    run = ("--num-rollout", str(steps), "--save-interval", "50", "--true-on-policy-mode", "--dtype", dtype)
    run += flags
    done = cli("train", *SMALL, *run)
    assert done.returncode == 0, done.stderr
    reader = RunReader(cli.only_run())
    for name in ZERO:
        assert list(reader.series(name).values) == [0.0] * steps, name
    assert any(value > 0 for value in reader.series("train/grad_norm").values)
    assert not [alert for alert in reader.alerts() if alert["rule"] == "MM9"]
    (told,) = reader.history.of_kind("numerics")
    assert told["numerics"] == "exact" and {"experts", "attention"} <= told.keys()
    assert ("compiled" in told["rows"]) == (compiled and dtype == "fp32")


@pytest.mark.parametrize("model", FAMILIES)
def test_other_families_are_exactly_on_policy(
    model: str, cli: Cli, warm_checkpoint: Path, tmp_path: Path
) -> None:
    """The small model of a family, with random weights and rewards; sequences are longer than it sees."""
    described, small = tmp_path / "described", tmp_path / "small"
    described.mkdir()
    config = small_config(shipped_spec(model), len(sort.VOCABULARY))
    special = {key: value for key, value in sort.model_config().items() if key.endswith("_token_id")}
    (described / "config.json").write_text(json.dumps(config | special | {"torch_dtype": "float32"}))
    copy_companions(warm_checkpoint, described)
    make_small_model(described, small)
    steps = ("--num-rollout", "3", "--skip-eval-before-train", "--rm-type", "random")
    done = cli("train", *SMALL, *steps, "--true-on-policy-mode", "--hf-checkpoint", str(small))
    assert done.returncode == 0, done.stderr
    reader = RunReader(cli.only_run())
    for name in ZERO[:2]:
        assert list(reader.series(name).values) == [0.0] * 3, name
    assert all(value > 0 for value in reader.series("train/grad_norm").values)


def test_an_engine_with_other_weights_is_an_alarm(cli: Cli) -> None:
    """From step 2 on the engine keeps old weights: the steps go on, and MM9 names the first layer."""
    run = ("--num-rollout", "4", "--true-on-policy-mode", "--inject-fault", "stale_engine@2")
    done = cli("train", *SMALL, *run)
    assert done.returncode == 0, done.stderr
    reader = RunReader(cli.only_run())
    gaps = reader.series("train/train_rollout_logprob_abs_diff").values
    assert gaps[0] == 0.0 and all(gap > 0 for gap in gaps[2:])
    alert = next(alert for alert in reader.alerts() if alert["rule"] == "MM9")
    assert alert["severity"] == "critical"
    assert "the first layer that differs: embedding" in str(alert["evidence"])
