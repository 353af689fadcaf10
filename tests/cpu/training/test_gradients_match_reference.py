"""The trainer's loss and gradients equal a plain reference: one sequence at a time, formulas written out."""

from __future__ import annotations

import pytest
import torch

from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import PolicyLossSettings
from miles.algorithms.policy_objective import ClipRange
from miles.models.attention import PackedAttention
from miles.models.routing import Router
from miles.training.settings import AlgorithmSettings, TrainerSettings

CUTS = {
    "one": {},
    "by_tokens": {"max_tokens_per_micro_batch": 30},
    "tight": {"max_tokens_per_micro_batch": 1},
    "by_count": {"micro_batch_size": 5},
    "recompute": {"micro_batch_size": 5, "recompute_num_layers": 2},
    "recompute_parts": {"micro_batch_size": 5, "recompute_modules": frozenset({"core_attn", "mlp", "moe"})},
    "chunks": {"micro_batch_size": 5, "log_probs_chunk_size": 3},
}
POLICY = PolicyLossSettings(
    clip=ClipRange(0.1, 0.28, dual=3.0),
    kl_loss_coef=0.1,
    kl_loss_type="k3",
    entropy_coef=0.02,
    correction=ImportanceCorrection(0.5, 1.05),
)


def captured_gradients(trainer) -> dict[str, torch.Tensor]:
    """Train on nothing: keep the gradients that the optimizer would have applied."""
    found: dict[str, torch.Tensor] = {}

    def capture(learning_rate: float, norm: float) -> None:
        found.update({name: g.clone() for name, g in trainer.optimizer.gradients().items()})
        trainer.optimizer.clear()

    trainer.optimizer.apply = capture
    return found


def reference_loss(decoder, batch, old, reference, advantages, per_token: bool, temperature: float):
    rollout_of_row = batch.rollout_ids[batch.sequence_ids]
    rollouts = {r: batch.loss_mask[rollout_of_row == r].sum() for r in batch.rollout_ids}
    total = torch.zeros(())
    for n in range(batch.num_sequences):
        rows = range(batch.cu_seqlens[n], batch.cu_seqlens[n + 1])
        tokens = torch.from_numpy(batch.tokens[rows])
        router = Router.replay(torch.from_numpy(batch.routes[rows]))
        attention = PackedAttention(torch.tensor([0, len(rows)]))
        hidden = decoder(tokens, torch.arange(len(rows)), attention, router)
        log_p = torch.log_softmax(decoder.logits(hidden) / temperature, -1)
        for t, row in enumerate(rows):
            if batch.loss_mask[row] == 0:
                continue
            lp = log_p[t, batch.targets[row]]
            ratio = torch.exp(lp - old[row])
            advantage = advantages[row]
            loss = torch.max(-ratio * advantage, -ratio.clamp(0.9, 1.28) * advantage)
            if advantage < 0:
                loss = torch.min(-3.0 * advantage, loss)
            weight = torch.exp(old[row] - batch.rollout_log_probs[row]).clamp(0.5, 1.05)
            x = reference[row] - lp
            kl = torch.exp(x) - 1 - x
            entropy = -(log_p[t].exp() * log_p[t]).sum()
            value = weight * loss + 0.1 * kl - 0.02 * entropy
            if per_token:
                total = total + value / float(batch.loss_mask.sum())
            else:
                rollout = batch.rollout_ids[n]
                total = total + value / float(rollouts[rollout]) / len(rollouts)
    return total


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradients(cut, per_token, spec, make_trainer, make_batch, with_siblings) -> None:
    temperature = 0.8
    algorithm = AlgorithmSettings(
        policy=POLICY, use_kl_loss=True, calculate_per_token_loss=per_token, temperature=temperature
    )
    trainer = make_trainer(spec, TrainerSettings(algorithm=algorithm, **CUTS[cut]))
    batch = with_siblings(make_batch(spec, noise=0.3))
    generator = torch.Generator().manual_seed(5)
    rows = batch.num_tokens
    old = torch.from_numpy(trainer.log_probs(batch).log_probs).nan_to_num() + 0.2 * torch.randn(
        rows, generator=generator
    )
    reference = old + 0.3 * torch.randn(rows, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    full = batch.with_rows(
        old_log_probs=old.numpy(), ref_log_probs=reference.numpy(), advantages=advantages.numpy()
    )

    expected = reference_loss(trainer.decoder, full, old, reference, advantages, per_token, temperature)
    names, parameters = zip(*trainer.decoder.named_parameters(), strict=True)
    expected_gradients = dict(zip(names, torch.autograd.grad(expected, parameters), strict=True))

    gradients = captured_gradients(trainer)
    result = trainer.train_step(full)
    assert result.metrics["train/loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-5, rtol=1e-4)
    norm = torch.sqrt(sum(g.square().sum() for g in expected_gradients.values()))
    assert result.metrics["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("cut", CUTS)
def test_metrics_do_not_depend_on_the_cut(cut, spec, make_trainer, make_batch) -> None:
    algorithm = AlgorithmSettings(observe_training_entropy=True)
    batch = make_batch(spec, noise=0.3)
    whole = make_trainer(spec, TrainerSettings(algorithm=algorithm)).train_step(batch).metrics
    cut_up = make_trainer(spec, TrainerSettings(algorithm=algorithm, **CUTS[cut])).train_step(batch).metrics
    assert cut_up == pytest.approx(whole, abs=1e-5)
