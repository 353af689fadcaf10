"""`miles train --true-on-policy-mode`: the gap is exactly 0 on every token of every step."""

from __future__ import annotations

import pytest
from e2e_support import SMALL, Cli

from miles.planning.facts.compiler import read_compiler
from miles.record import RunReader

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
