"""What ships: recipes that say what they promise, layers that stand alone."""

from __future__ import annotations

import tomllib

import pytest

from miles.config import resolve, shipped_names, shipped_root
from miles.config.derive import KNOBS


@pytest.mark.parametrize("name", shipped_names())
def test_every_profile_resolves_on_its_own_and_says_what_it_is(name: str) -> None:
    resolve(name)
    text = (shipped_root() / f"{name}.toml").read_text()
    assert tomllib.loads(text)["description"]


@pytest.mark.parametrize("name", shipped_names())
def test_no_profile_sets_all_four_knobs(name: str) -> None:
    resolved = resolve(name)
    assert sum(resolved.is_explicit(knob) for knob in KNOBS) <= 3


@pytest.mark.parametrize("name", shipped_names())
def test_a_user_can_change_any_batch_size_of_a_profile(name: str) -> None:
    resolve(name, sets=["rollout.rollout_batch_size=64", "rollout.n_samples_per_prompt=4"])


def test_quickstart_is_the_recipe_that_was_seen_to_learn() -> None:
    config = resolve("quickstart").config
    assert (config.model.hf_checkpoint, config.data.prompt_data) == ("builtin:sort", "builtin:sort/train")
    assert (config.rollout.rollout_batch_size, config.rollout.n_samples_per_prompt) == (32, 8)
    assert (config.rollout.num_rollout, config.rollout.rollout_max_response_len) == (80, 12)
    assert (config.training.global_batch_size, config.training.num_steps_per_rollout) == (256, 1)
    assert (config.optimizer.lr, config.optimizer.lr_warmup_iters, config.optimizer.clip_grad) == (
        4e-4,
        5,
        1.0,
    )
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (0.9, 0.99)
    assert (config.algorithm.eps_clip, config.algorithm.eps_clip_high) == (0.2, 0.28)
    assert config.algorithm.calculate_per_token_loss
    assert config.eval.eval_prompt_data == ("sort", "builtin:sort/test")
    assert config.alignment.use_rollout_routing_replay is None, "planning derives replay from the model"
    assert (config.training.backend, config.rollout.backend) == ("native", "native")


def test_qwen3_moe_fp8_uses_one_format_on_both_sides_and_replays_routes() -> None:
    config = resolve("qwen3-moe-fp8").config
    assert (config.precision.fp8_format, config.precision.fp8_recipe) == ("e4m3", "blockwise")
    assert config.precision.rollout_format == "fp8"
    assert config.alignment.use_rollout_routing_replay is True
    assert (config.training.backend, config.rollout.backend) == ("megatron", "sglang")
    assert config.cluster.actor_num_nodes * config.cluster.actor_num_gpus_per_node == 16
    assert config.cluster.rollout_num_gpus == 16
