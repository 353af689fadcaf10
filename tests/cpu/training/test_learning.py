"""The trainer learns: rewarded responses get likelier, SFT lowers the loss, experts get balanced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.algorithms.advantages import ESTIMATORS
from miles.algorithms.losses import PolicyLossSettings
from miles.errors import DataError
from miles.training.batch_advantages import with_advantages
from miles.training.native.step_batch import StepBatch
from miles.training.settings import AlgorithmSettings, CriticSettings, OptimizerSettings, TrainerSettings

FAST = TrainerSettings(optimizer=OptimizerSettings(lr=3e-3), probe_tokens=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewarded_responses_get_likelier(estimator, spec, make_trainer, make_batch) -> None:
    policy = PolicyLossSettings(objective=ESTIMATORS[estimator].objective)
    algorithm = AlgorithmSettings(advantage_estimator=estimator, max_response_len=8, policy=policy)
    critic = CriticSettings(lr=3e-3) if ESTIMATORS[estimator].uses_values else None
    trainer = make_trainer(spec, replace(FAST, algorithm=algorithm, critic=critic))
    if critic is not None:
        trainer.start_critic()
    batch = make_batch(spec, num_groups=4)
    batch = replace(batch, rewards=(np.arange(batch.num_sequences) % 2).astype(np.float32))
    rewarded = (batch.rewards[batch.sequence_ids] == 1) & (batch.loss_mask > 0)
    punished = (batch.rewards[batch.sequence_ids] == 0) & (batch.loss_mask > 0)

    def margin() -> float:
        log_probs = trainer.log_probs(batch).log_probs
        return float(log_probs[rewarded].mean() - log_probs[punished].mean())

    before = margin()
    for _ in range(4):
        trainer.train_step(batch)
    assert margin() > before + 0.02


def test_sft_lowers_the_negative_log_likelihood(spec, make_trainer, make_batch) -> None:
    algorithm = AlgorithmSettings(loss_type="sft_loss", calculate_per_token_loss=True)
    trainer = make_trainer(spec, replace(FAST, algorithm=algorithm))
    batch = make_batch(spec)
    blank = np.full(batch.num_tokens, np.nan, np.float32)
    demonstrations = replace(
        batch,
        routes=None,
        rollout_log_probs=blank,
        rewards=np.full(batch.num_sequences, np.nan, np.float32),
        group_index=np.full(batch.num_sequences, -1),
        rollout_ids=np.full(batch.num_sequences, -1),
    )
    losses = [trainer.train_step(demonstrations).metrics["train/loss"] for _ in range(20)]
    mean = np.nanmean(make_trainer(spec).log_probs(demonstrations).log_probs)
    assert losses[0] == pytest.approx(-mean, abs=1e-5)
    assert losses[-1] < losses[0] - 0.5


def test_the_auxiliary_loss_balances_the_experts(spec, make_trainer, make_batch) -> None:
    algorithm = AlgorithmSettings(loss_type="sft_loss")
    trainer = make_trainer(spec, replace(FAST, algorithm=algorithm, moe_aux_loss_coeff=5.0))
    batch = replace(make_batch(spec, num_groups=8), routes=None)
    with torch.no_grad():
        for name, parameter in trainer.decoder.named_parameters():
            if name.endswith("router"):
                parameter.mul_(5.0)
    rows = [trainer.train_step(batch).metrics for _ in range(30)]
    assert 1.0 <= rows[-1]["train/aux_loss"] < rows[0]["train/aux_loss"]
    assert rows[-1]["route/expert_load_max_over_mean"] < rows[0]["route/expert_load_max_over_mean"]


@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 5}])
def test_equal_router_probabilities_have_an_auxiliary_loss_of_1(cut, spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec, replace(FAST, moe_aux_loss_coeff=0.01, **cut))
    with torch.no_grad():
        for name, parameter in trainer.decoder.named_parameters():
            if name.endswith("router"):
                parameter.zero_()
    assert trainer.train_step(make_batch(spec)).metrics["train/aux_loss"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("flat_groups", [1, 3])
def test_flat_groups_are_measured_but_not_differentiated(
    flat_groups, spec, make_trainer, make_batch, monkeypatch
) -> None:
    """A group of equal rewards has no gradient: leaving its backward out changes nothing."""
    batch = make_batch(spec, noise=0.2)
    rewards = batch.rewards.copy()
    rewards[: 4 * flat_groups] = 1.0
    batch = replace(batch, rewards=rewards)
    lazy, full = make_trainer(spec, FAST), make_trainer(spec, FAST)
    for trainer in (lazy, full):
        trainer.train_step(make_batch(spec, seed=1))  # moments that even a step without gradient applies
    monkeypatch.setattr(StepBatch, "without_advantage", spy := Spy(StepBatch.without_advantage))
    rows = [lazy.train_step(batch).metrics for _ in range(2)]
    assert spy.results[0].sum() == 4 * flat_groups
    monkeypatch.setattr(
        StepBatch, "without_advantage", lambda step: np.zeros(len(step.indices_N), dtype=bool)
    )
    expected = [full.train_step(batch).metrics for _ in range(2)]
    assert rows[0] == pytest.approx(expected[0], abs=1e-6)
    assert rows[1] == pytest.approx(expected[1], abs=1e-4)
    weights = dict(full.named_weights())
    for name, tensor in lazy.named_weights():
        torch.testing.assert_close(tensor, weights[name], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "term",
    [
        {"moe_aux_loss_coeff": 0.1},
        {"algorithm": AlgorithmSettings(policy=PolicyLossSettings(entropy_coef=1.0))},
    ],
)
def test_flat_groups_are_differentiated_for_any_other_term(term, spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec)
    flat = replace(batch, rewards=np.ones_like(batch.rewards))
    assert make_trainer(spec, FAST).train_step(flat).metrics["train/grad_norm"] == 0
    assert make_trainer(spec, replace(FAST, **term)).train_step(flat).metrics["train/grad_norm"] > 0


class Spy:
    """A method that remembers what it returned."""

    def __init__(self, method) -> None:
        self.method, self.results = method, []

    def __get__(self, instance, owner):
        def call():
            self.results.append(self.method(instance))
            return self.results[-1]

        return call


def test_groups_and_whitening_span_the_rollout_batch(spec, make_batch) -> None:
    batch = make_batch(spec)
    batch = replace(batch, rewards=np.array([1, 0, 0, 1] + [1] * 4 + [0, 2, 4, 6], np.float32))
    ready, metrics = with_advantages(batch, AlgorithmSettings())
    assert metrics["train/active_group_fraction"] == pytest.approx(2 / 3)
    per_sequence = [ready.advantages[start] for start in batch.cu_seqlens[1:] - 1]
    assert per_sequence[0] > 0 > per_sequence[1]
    assert per_sequence[4:8] == [0.0] * 4
    assert (ready.advantages[batch.loss_mask == 0] == 0).all()
    white, _ = with_advantages(batch, AlgorithmSettings(normalize_advantages=True))
    assert white.advantages[batch.loss_mask > 0].std(ddof=1) == pytest.approx(1.0, abs=1e-4)


def test_samples_without_a_reward_or_a_group_are_refused(spec, make_batch) -> None:
    batch = make_batch(spec)
    rewards = batch.rewards.copy()
    rewards[5] = np.nan
    with pytest.raises(DataError, match=r"\[5\]"):
        with_advantages(replace(batch, rewards=rewards), AlgorithmSettings())
    groupless = replace(batch, group_index=np.full(batch.num_sequences, -1))
    with pytest.raises(DataError, match="group"):
        with_advantages(groupless, AlgorithmSettings())
    with_advantages(groupless, AlgorithmSettings(disable_rewards_normalization=True))


def test_a_step_without_a_trained_token_is_refused(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec)
    empty = replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    with pytest.raises(DataError, match="no token"):
        make_trainer(spec).train_step(empty)


def test_the_same_batches_give_the_same_bits(spec, make_trainer, make_batch) -> None:
    def run() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        trainer = make_trainer(spec, replace(FAST, max_tokens_per_micro_batch=40))
        rows = [trainer.train_step(make_batch(spec, seed=seed)).metrics for seed in range(3)]
        return rows, dict(trainer.named_weights())

    (rows, left), (again, right) = run(), run()
    assert rows == again
    assert all(torch.equal(left[name], right[name]) for name in left)
