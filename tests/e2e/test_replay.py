"""`miles replay`: a kept step runs again on both sides, and what differs is named."""

from __future__ import annotations

import json

import pytest
from e2e_support import SMALL, Cli

pytestmark = pytest.mark.slow

RUN = (*SMALL, "--num-rollout", "3", "--capsule-interval", "1", "--true-on-policy-mode")


def test_a_step_agrees_when_run_again_and_a_perturbed_layer_is_named(cli: Cli) -> None:
    assert cli("train", *RUN).returncode == 0
    done = cli("replay", "last", "--step", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["agrees"] and found["step"] == 2 and found["weight_versions"] == [1]
    gaps = found["gaps"]
    assert all(gap["tokens"] > 50 and gap["max"] == 0.0 for gap in gaps.values())

    weight = "model.layers.1.self_attn.o_proj.weight"
    done = cli("replay", "last", "--step", "2", "--perturb", weight, "--json")
    assert done.returncode == 5, done.stderr
    found = json.loads(done.stdout)
    assert found["gaps"]["trainer - recorded"]["differing"] == 0
    assert found["gaps"]["trainer - engine again"]["differing"] > 0
    assert (found["first_difference"]["layer"], found["first_difference"]["module"]) == (1, "attention")
    assert found["first_token"]["recorded"] == found["first_token"]["trainer"]

    done = cli(
        "replay",
        "last",
        "--engine-set",
        "alignment.numerics=fast",
        "--engine-set",
        "alignment.true_on_policy_mode=false",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 3") and "engine: fast" in done.stdout

    for words, code, text in (
        (("last", "--step", "9"), 1, "step 9 was not kept"),
        (("nobody",), 1, "nobody"),
        (("last", "--perturb", "model.wte"), 1, "no weight model.wte"),
    ):
        done = cli("replay", *words)
        assert done.returncode == code and text in done.stderr, done.stderr


def test_an_engine_that_kept_old_weights_is_told_from_a_wrong_layer(cli: Cli) -> None:
    """The perturbed side is the recorded one: on the step's own weights both sides agree, where the trainer
    does not follow the routes that the old weights took."""
    assert cli("train", *RUN, "--inject-fault", "stale_engine@2").returncode == 0
    own_routes = ("--set", "alignment.use_rollout_routing_replay=false")
    done = cli("replay", "last", "--step", "3", *own_routes, "--json")
    assert done.returncode == 5, done.stderr
    found = json.loads(done.stdout)
    assert found["gaps"]["trainer - recorded"]["differing"] > 0
    assert found["gaps"]["trainer - engine again"]["differing"] == 0
    assert found["first_difference"] is None and "other weights" in found["verdict"]
