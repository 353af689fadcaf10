"""PPO's critic: its values, what it learns and when, and how it is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.algorithms.losses import PolicyLossSettings
from miles.arch import published_tensors, spec_from_hf_config
from miles.arch.shrink import small_config
from miles.arch.specs import shipped_spec
from miles.errors import CheckpointError, MilesError, RunError
from miles.models.decoder import Decoder
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, CriticSettings, OptimizerSettings, TrainerSettings
from miles.weights.native_map import published_views

PPO = TrainerSettings(
    optimizer=OptimizerSettings(lr=1e-3),
    algorithm=AlgorithmSettings(advantage_estimator="ppo", gamma=0.99, lambd=0.95),
    critic=CriticSettings(lr=2e-3),
    probe_tokens=0,
)
TWO_STEPS = replace(PPO, num_steps_per_rollout=2, micro_batch_size=3)
SPARSE = replace(PPO, critic=CriticSettings(lr=2e-3, num_critic_only_steps=2))


@pytest.fixture
def make_ppo(make_trainer):
    def make(spec, settings=PPO, seed: int = 0, **more) -> NativeTrainer:
        trainer = make_trainer(spec, settings, seed, **more)
        trainer.start_critic()
        return trainer

    return make


def critic_weights(trainer: NativeTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.critic.decoder.named_parameters()}


def policy_weights(trainer: NativeTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(t, right[n]) for n, t in left.items())


def test_a_new_critic_is_the_policy_with_a_head_of_zeros(spec, make_ppo, make_batch) -> None:
    trainer, batch = make_ppo(spec), make_batch(spec)
    ours, policy = critic_weights(trainer), dict(trainer.decoder.named_parameters())
    assert ours.pop("head").tolist() == [[0.0] * spec.hidden_size]
    assert same(ours, policy)
    metrics = trainer.train_step(batch).metrics
    assert metrics["rollout/values"] == 0 and metrics["train/explained_variance"] == 0
    assert metrics["train/value_loss"] > 0 and metrics["train/value_clipfrac"] == 0
    assert metrics["train/critic_lr"] == 2e-3 and metrics["train/lr"] == 1e-3


@pytest.mark.parametrize("moe", [True, False])
def test_values_are_those_of_transformers(moe, spec, dense_spec, make_ppo, make_batch, tmp_path) -> None:
    """After training; a critic's checkpoint is a sequence classifier of one label."""
    from transformers import AutoModelForSequenceClassification

    spec = spec if moe else dense_spec
    trainer, batch = make_ppo(spec), make_batch(spec, noise=0.3)
    for _ in range(3):
        trainer.train_step(batch)
    values = trainer._values(batch)
    trainer.save(tmp_path)
    where = tmp_path / "critic" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(where, num_labels=1, dtype=torch.float32)
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        with torch.no_grad():
            hidden = model.model(torch.from_numpy(batch.tokens[start:end])[None]).last_hidden_state
            theirs = model.score(hidden)[0, :, 0].numpy()
        trained = batch.loss_mask[start:end] > 0
        np.testing.assert_allclose(values[start:end][trained], theirs[trained], atol=1e-5)
        assert np.isnan(values[start:end][~trained]).all()
    assert np.nanstd(values) > 1e-3


@pytest.mark.parametrize(
    "name", ["qwen3-30b-a3b", "deepseek-v3.2", "glm-4.5-air", "minimax-m2.1", "gemma-2-2b", "gemma-3n-e2b"]
)
def test_every_family_has_critics(name: str) -> None:
    """Names and shapes of a small one; embeddings are never its head, and MTP layers stay behind."""
    policy = spec_from_hf_config(small_config(shipped_spec(name), vocab_size=64))
    with torch.device("meta"):
        native = dict(Decoder(policy.critic).named_parameters())
    views = {name: tuple(view.shape) for name, view in published_views(policy.critic, native)}
    assert views == published_tensors(policy.critic)
    assert views["score.weight"] == (1, policy.hidden_size) and "lm_head.weight" not in views
    assert sum(p.numel() for p in native.values()) == policy.critic.num_parameters()


def test_the_critic_routes_by_itself(spec, make_ppo, make_batch) -> None:
    trainer, batch = make_ppo(spec), make_batch(spec, noise=3.0)
    trainer.train_step(batch)
    other = replace(batch, routes=(batch.routes + 1) % spec.num_experts)
    np.testing.assert_array_equal(trainer._values(batch), trainer._values(other))
    assert (trainer.log_probs(batch).log_probs != trainer.log_probs(other).log_probs).any()


def test_a_critic_learns_to_foresee_rewards(spec, make_ppo, make_batch) -> None:
    """A batch again and again, its policy left alone: at the end the values explain its returns."""
    settings = replace(PPO, critic=CriticSettings(lr=1e-2, value_clip=10.0, num_critic_only_steps=99))
    trainer, batch = make_ppo(spec, settings), make_batch(spec)
    before = policy_weights(trainer)
    rows = [trainer.train_step(batch).metrics for _ in range(20)]
    assert rows[-1]["train/explained_variance"] > 0.7
    assert rows[-1]["train/value_loss"] < rows[0]["train/value_loss"] / 5
    assert same(policy_weights(trainer), before)


def test_the_policy_waits_while_the_critic_warms_up(spec, make_ppo, make_batch) -> None:
    trainer = make_ppo(spec, SPARSE)
    first = policy_weights(trainer)
    for seed in range(2):
        before = critic_weights(trainer)
        metrics = trainer.train_step(make_batch(spec, seed=seed)).metrics
        assert same(policy_weights(trainer), first) and not same(critic_weights(trainer), before)
        assert "train/loss" not in metrics and metrics["train/step_skipped"] == 0
        assert metrics["train/train_rollout_logprob_abs_diff"] < 1e-5, "the gap is measured all the same"
    assert (trainer.state.step, trainer.state.updates) == (2, 0)
    assert "train/loss" in trainer.train_step(make_batch(spec, seed=2)).metrics
    assert not same(policy_weights(trainer), first)
    assert (trainer.state.step, trainer.state.updates) == (3, 1)


def test_how_a_step_is_cut_does_not_matter(spec, make_ppo, make_batch) -> None:
    settings = replace(PPO, algorithm=replace(PPO.algorithm, calculate_per_token_loss=True))
    batches = [make_batch(spec, seed=seed, one_prompt_per_group=True) for seed in range(3)]
    whole, cut = make_ppo(spec, settings), make_ppo(spec, replace(settings, micro_batch_size=1))
    for batch in batches:
        left, right = whole.train_step(batch).metrics, cut.train_step(batch).metrics
        for name in ("train/value_loss", "train/critic_grad_norm", "rollout/values", "train/loss"):
            assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-6), name


def test_the_kl_penalty_is_part_of_the_returns(spec, make_ppo, make_batch) -> None:
    shaped = replace(PPO, algorithm=replace(PPO.algorithm, kl_coef=0.5, gamma=1.0, lambd=1.0))
    trainer, batch = make_ppo(spec, shaped), make_batch(spec)
    other = NativeTrainer(spec, TrainerSettings())
    other.init_weights(1)
    trainer.load_weights(other.named_weights(), "reference")
    ours, reference = trainer.log_probs(batch).log_probs, trainer.log_probs(batch, "reference").log_probs
    metrics = trainer.train_step(batch).metrics
    trained = batch.loss_mask > 0
    penalty = np.where(trained, 0.5 * (ours - reference), 0.0)
    returns = []
    for n, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        rest = penalty[start:end][::-1].cumsum()[::-1]
        returns += list((batch.rewards[n] - rest)[trained[start:end]])
    assert metrics["rollout/returns"] == pytest.approx(np.mean(returns), abs=1e-4)


def test_a_sick_critic_is_not_updated(spec, make_ppo, make_batch) -> None:
    trainer = make_ppo(spec)
    before = critic_weights(trainer)
    bad = make_batch(spec)
    bad = bad.with_rows(
        values=np.zeros(bad.num_tokens, np.float32),
        advantages=np.zeros(bad.num_tokens, np.float32),
        returns=np.where(bad.loss_mask > 0, np.float32(np.inf), np.float32(0)),
    )
    result = trainer.train_step(bad)
    assert same(critic_weights(trainer), before)
    assert [event["tensor"] for event in result.events] == ["returns"]
    assert result.metrics["train/critic_non_finite_elements"] == bad.loss_mask.sum()
    assert (trainer.state.updates, trainer.state.critic.updates) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_critic_is_the_same_bits(dtype, spec, make_ppo, make_batch, tmp_path) -> None:
    """Cut off in the middle of its warm-up."""
    settings = replace(TWO_STEPS, critic=SPARSE.critic)
    batches = [make_batch(spec, seed=seed) for seed in range(4)]
    straight = make_ppo(spec, settings, dtype=dtype)
    rows = [untimed(straight.train_step(batch).metrics) for batch in batches]
    first = make_ppo(spec, settings, dtype=dtype)
    first.train_step(batches[0])
    first.set("critic_lr", 2e-3)
    first.save(tmp_path)
    second = make_ppo(spec, settings, seed=5, dtype=dtype)
    second.load(tmp_path)
    assert second.state.critic == first.state.critic
    assert [untimed(second.train_step(batch).metrics) for batch in batches[1:]] == rows[1:]
    assert same(critic_weights(second), critic_weights(straight))


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def test_a_run_takes_a_critic_up_and_leaves_it(spec, make_ppo, make_trainer, make_batch, tmp_path) -> None:
    grpo = make_trainer(spec)
    grpo.train_step(make_batch(spec))
    (tmp_path / "grpo").mkdir()
    grpo.save(tmp_path / "grpo")
    trainer = make_ppo(spec, SPARSE)
    trainer.load(tmp_path / "grpo")
    assert "train/loss" not in trainer.train_step(make_batch(spec)).metrics, "its new critic warms up"
    (tmp_path / "ppo").mkdir()
    trainer.save(tmp_path / "ppo")
    grpo.load(tmp_path / "ppo")
    assert grpo.state.critic is None and grpo.knobs().keys() == {"lr", "kl_loss_coef", "entropy_coef"}


@pytest.mark.parametrize("name", ["critic/model/model.safetensors", "critic/optimizer/exp_avg.safetensors"])
def test_a_damaged_critic_is_refused_by_name(name, spec, make_ppo, tmp_path) -> None:
    trainer = make_ppo(spec)
    trainer.save(tmp_path)
    path: Path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=path.name):
        trainer.load(tmp_path)


def test_its_learning_rate_is_a_knob_of_runs_with_a_critic(spec, make_ppo, make_trainer, make_batch) -> None:
    trainer = make_ppo(spec)
    trainer.set("critic_lr", 1e-4)
    assert trainer.train_step(make_batch(spec)).metrics["train/critic_lr"] == 1e-4
    with pytest.raises(RunError, match="no effect"):
        make_trainer(spec).set("critic_lr", 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        TrainerSettings(critic=CriticSettings()),
        replace(PPO, critic=None),
        replace(PPO, algorithm=replace(PPO.algorithm, policy=PolicyLossSettings(objective="cispo"))),
    ],
)
def test_contradictions_are_refused(settings, spec) -> None:
    with pytest.raises(MilesError, match=r"critic|objective"):
        NativeTrainer(spec, settings)
