"""What follows from other values, and that an explicit value always wins."""

from __future__ import annotations

import pytest

from miles.config import ResolvedConfig, resolve
from miles.errors import ConfigError, ExitCode

KNOBS = {
    "prompts": "rollout.rollout_batch_size",
    "samples": "rollout.n_samples_per_prompt",
    "batch": "training.global_batch_size",
    "steps": "training.num_steps_per_rollout",
}


def solve(**knobs: int) -> ResolvedConfig:
    return resolve(sets=[f"{KNOBS[name]}={value}" for name, value in knobs.items()])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prompts": 32, "samples": 8}, (32, 8, 256, 1)),
        ({"prompts": 32, "samples": 8, "steps": 2}, (32, 8, 128, 2)),
        ({"prompts": 32, "samples": 8, "batch": 64}, (32, 8, 64, 4)),
        ({"prompts": 32, "batch": 256}, (32, 8, 256, 1)),
        ({"samples": 8, "batch": 256}, (32, 8, 256, 1)),
        ({"prompts": 32, "batch": 64, "steps": 4}, (32, 8, 64, 4)),
        ({"prompts": 32}, (32, 1, 32, 1)),
        ({"prompts": 32, "steps": 4}, (32, 1, 8, 4)),
        ({"batch": 32}, (32, 1, 32, 1)),
        ({"prompts": 32, "samples": 8, "batch": 128, "steps": 2}, (32, 8, 128, 2)),
    ],
)
def test_the_missing_knob_is_derived(given: dict[str, int], expected: tuple[int, ...]) -> None:
    resolved = solve(**given)
    assert tuple(resolved.value(dotted) for dotted in KNOBS.values()) == expected
    for name, dotted in KNOBS.items():
        assert resolved.is_explicit(dotted) == (name in given)


def test_a_derived_value_names_its_rule() -> None:
    origin = str(solve(prompts=32, samples=8).origin("training.global_batch_size"))
    assert origin == "derived: four knobs: rollout_batch_size x n_samples_per_prompt / num_steps_per_rollout"


def test_without_a_batch_size_nothing_is_derived() -> None:
    resolved = solve(samples=8)
    assert resolved.config.rollout.rollout_batch_size is None
    assert resolved.config.training.global_batch_size is None


@pytest.mark.parametrize(
    "given",
    [
        {"prompts": 32, "samples": 8, "batch": 100, "steps": 2},
        {"prompts": 32, "samples": 8, "batch": 100},
        {"prompts": 32, "samples": 8, "steps": 3},
        {"prompts": 32, "batch": 100},
        {"samples": 8, "batch": 100},
        {"prompts": 2, "samples": 2, "batch": 8},
    ],
)
def test_knobs_that_do_not_agree_are_refused_in_one_message(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as refusal:
        solve(**given)
    (problem,) = refusal.value.problems
    assert refusal.value.exit_code == ExitCode.USAGE
    for name, value in given.items():
        leaf = KNOBS[name].partition(".")[2]
        assert f"{leaf} = {value}" in problem.what
        assert f"--set {KNOBS[name]}" in problem.where
    assert problem.why
    assert problem.fix


def test_settings_without_a_value_take_their_counterparts() -> None:
    config = resolve(sets=["algorithm.eps_clip=0.3", "rollout.rollout_temperature=0.7"]).config
    assert config.algorithm.eps_clip_high == 0.3
    assert config.eval.eval_temperature == 0.7


def test_an_explicit_value_wins_over_the_counterpart() -> None:
    resolved = resolve(sets=["eval.eval_temperature=0.0", "rollout.rollout_temperature=0.7"])
    assert resolved.config.eval.eval_temperature == 0.0


def test_colocated_engines_get_the_trainers_gpus() -> None:
    resolved = resolve(sets=["cluster.colocate=true", "cluster.actor_num_nodes=2"])
    assert resolved.config.cluster.rollout_num_gpus == 16
    assert resolved.config.cluster.offload_train is True
    kept = resolve(
        sets=["cluster.colocate=true", "cluster.offload_train=false", "cluster.rollout_num_gpus=8"]
    )
    assert kept.config.cluster.rollout_num_gpus == 8
    assert kept.config.cluster.offload_train is False
    assert kept.config.cluster.offload_rollout is True


def test_derive_makes_a_copy_and_never_overrides_an_explicit_value() -> None:
    before = resolve(sets=["optimizer.lr=0.1"])
    after = before.derive("run.threads", 1, "small model")
    assert (before.config.run.threads, after.config.run.threads) == (None, 1)
    assert str(after.origin("run.threads")) == "derived: small model"
    assert after.config.optimizer.lr == 0.1
    with pytest.raises(AssertionError, match=r"was set by --set optimizer\.lr"):
        before.derive("optimizer.lr", 1.0, "a rule")
    with pytest.raises(ValueError, match="threads"):
        before.derive("run.threads", "one", "a rule of the wrong type")
