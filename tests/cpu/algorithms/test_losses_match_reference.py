"""Losses, metrics and gradients equal a plain per-sequence reference, however the step is packed and cut."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch

from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import LossRows, PolicyLossSettings, policy_loss, sft_loss
from miles.algorithms.policy_objective import ClipRange
from miles.algorithms.reductions import token_weights
from miles.algorithms.rejection import Rejection
from miles.algorithms.sequences import Sequences

ROLLOUT_IDS = [4, 4, 9, 1, 7, 7, 7, 2]
DIVISOR = 16.0


@dataclass
class Step:
    """One optimizer step of eight sequences, rows of each in a tensor of its own."""

    log_probs: list[torch.Tensor] = field(default_factory=list)
    entropy: list[torch.Tensor] = field(default_factory=list)
    old: list[torch.Tensor] = field(default_factory=list)
    rollout: list[torch.Tensor] = field(default_factory=list)
    reference: list[torch.Tensor] = field(default_factory=list)
    advantages: list[torch.Tensor] = field(default_factory=list)
    mask: list[torch.Tensor] = field(default_factory=list)


def make_step(seed: int = 0) -> Step:
    generator = torch.Generator().manual_seed(seed)
    step = Step()
    for index, length in enumerate([5, 1, 7, 3, 11, 2, 6, 4]):
        log_probs = -3 * torch.rand(length, generator=generator)
        old = log_probs + 0.4 * torch.randn(length, generator=generator)
        rollout = old + 0.5 * torch.randn(length, generator=generator)
        mask = (torch.rand(length, generator=generator) > 0.3).float()
        mask[0] = 1.0
        if index == 3:
            mask.zero_()
        rollout[mask == 0] = math.nan
        step.log_probs.append(log_probs.double().requires_grad_())
        step.entropy.append(torch.rand(length, generator=generator).double().requires_grad_())
        step.old.append(old.double())
        step.rollout.append(rollout.double())
        step.reference.append((log_probs + 0.5 * torch.randn(length, generator=generator)).double())
        step.advantages.append(torch.randn(1, generator=generator).double().expand(length) * mask)
        step.mask.append(mask.double())
    return step


def reference_weights(step: Step, reduction: str) -> list[list[float]]:
    tokens: dict[int, float] = {}
    for rollout, mask in zip(ROLLOUT_IDS, step.mask, strict=True):
        tokens[rollout] = tokens.get(rollout, 0.0) + float(mask.sum())
    total = sum(tokens.values())
    out = []
    for rollout, mask in zip(ROLLOUT_IDS, step.mask, strict=True):
        denominator = {
            "token_mean": total,
            "rollout_mean": max(tokens[rollout], 1.0) * len(tokens),
            "constant": DIVISOR * len(tokens),
        }[reduction]
        out.append([float(m) / denominator for m in mask])
    return out


def reference_kl(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`x` = lp - lp_ref."""
    if kind == "k1":
        return x
    if kind == "k2":
        return 0.5 * x * x
    if kind == "k3":
        return torch.exp(-x) - 1 + x
    y = torch.clamp(-x, -20, 20)
    return torch.clamp(torch.exp(y) - 1 - y, -10, 10)


def reference_policy_loss(step: Step, s: PolicyLossSettings, reduction: str) -> torch.Tensor:
    """The formulas, one token at a time."""
    loss = torch.zeros((), dtype=torch.float64)
    for i, weights in enumerate(reference_weights(step, reduction)):
        trained = [t for t in range(len(weights)) if step.mask[i][t] > 0]
        if not trained:
            continue
        sequence_drift = sum(step.old[i][t] - step.log_probs[i][t] for t in trained) / len(trained)
        for t in trained:
            lp, old, advantage = step.log_probs[i][t], step.old[i][t], step.advantages[i][t]
            drift = sequence_drift if s.objective == "sequence_clip" else old - lp
            ratio = torch.exp(-drift)
            clipped = torch.clamp(ratio, 1 - s.clip.low, 1 + s.clip.high)
            if s.objective == "cispo":
                term = -clipped.detach() * advantage * lp
            else:
                term = torch.max(-ratio * advantage, -clipped * advantage)
                if s.clip.dual is not None and advantage < 0:
                    term = torch.min(-s.clip.dual * advantage, term)
            if s.opsm_delta is not None:
                drifts = [step.old[i][u] - step.log_probs[i][u] for u in trained]
                mean_drift = sequence_drift if s.objective == "sequence_clip" else sum(drifts) / len(drifts)
                if advantage < 0 and mean_drift > s.opsm_delta:
                    term = term * 0
            if s.correction is not None:
                term = term * bounded(weight(step, i, t, s.correction.level), s.correction)
            term = term - s.entropy_coef * step.entropy[i][t]
            kl = reference_kl(lp - step.reference[i][t], s.kl_loss_type)
            if s.use_unbiased_kl:
                kl = torch.exp(lp - old) * kl
            kept = s.rejection is None or keeps(step, i, t, s.rejection)
            loss = loss + kept * weights[t] * (term + s.kl_loss_coef * kl)
    return loss


def weight(step: Step, i: int, t: int, level: str) -> float:
    """exp(lp_old - lp_rollout) of the token, of all trained tokens of its sequence, or of their mean."""
    trained = [u for u in range(len(step.mask[i])) if step.mask[i][u] > 0]
    logs = [float(step.old[i][u] - step.rollout[i][u]) for u in ([t] if level == "token" else trained)]
    total = sum(logs) / len(logs) if level == "geometric" else sum(logs)
    return math.exp(min(max(total, -20.0), 20.0))


def bounded(w: float, correction: ImportanceCorrection) -> float:
    if correction.outside == "clamp":
        return min(max(w, correction.low), correction.high)
    return w if correction.low <= w <= correction.high else 0.0


def keeps(step: Step, i: int, t: int, rejection: Rejection) -> bool:
    if not rejection.low <= weight(step, i, t, rejection.level) <= rejection.high:
        return False
    trained = [u for u in range(len(step.mask[i])) if step.mask[i][u] > 0]
    return all(weight(step, i, u, "token") >= (rejection.veto or 0.0) for u in trained)


def packed_losses(step: Step, settings: PolicyLossSettings | None, reduction: str, cuts: list[list[int]]):
    """The step as packed micro-batches `cuts` (sequence indices): summed loss and summed metrics."""
    lengths = torch.tensor([len(m) for m in step.mask])
    everything = Sequences(torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]))
    weights = token_weights(
        torch.cat(step.mask), everything, torch.tensor(ROLLOUT_IDS), reduction, divisor=DIVISOR
    )
    per_sequence = weights.split(lengths.tolist())
    total, metrics = torch.zeros((), dtype=torch.float64), {}
    for cut in cuts:

        def flat(tensors, cut=cut):
            return torch.cat([tensors[i] for i in cut])

        cu_seqlens = torch.tensor([0, *torch.tensor([len(step.mask[i]) for i in cut]).cumsum(0).tolist()])
        rows = LossRows(
            log_probs_T=flat(step.log_probs),
            loss_mask_T=flat(step.mask),
            weights_T=flat(per_sequence),
            sequences=Sequences(cu_seqlens),
            sequence_weight=1 / len(ROLLOUT_IDS),
            old_log_probs_T=flat(step.old),
            advantages_T=flat(step.advantages),
            rollout_log_probs_T=flat(step.rollout),
            reference_T=flat(step.reference),
            entropy_T=flat(step.entropy),
        )
        output = policy_loss(rows, settings) if settings else sft_loss(rows)
        total = total + output.loss
        for name, value in output.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return total, metrics


def gradients(loss: torch.Tensor, step: Step) -> torch.Tensor:
    return torch.cat(torch.autograd.grad(loss, step.log_probs + step.entropy, materialize_grads=True))


CUTS = [
    [list(range(8))],
    [[i] for i in range(8)],
    [[3, 0, 6], [1], [7, 2, 5, 4]],
]
VARIANTS = {
    "plain": PolicyLossSettings(),
    "clip_higher": PolicyLossSettings(clip=ClipRange(0.2, 0.28)),
    "dual_clip": PolicyLossSettings(clip=ClipRange(0.1, 0.1, dual=1.2)),
    "cispo": PolicyLossSettings(objective="cispo", clip=ClipRange(1.0, 0.3)),
    "gspo": PolicyLossSettings(objective="sequence_clip", clip=ClipRange(0.05, 0.05)),
    "entropy": PolicyLossSettings(entropy_coef=0.05),
    "kl_k1": PolicyLossSettings(kl_loss_coef=0.2, kl_loss_type="k1"),
    "kl_k2": PolicyLossSettings(kl_loss_coef=0.2, kl_loss_type="k2"),
    "kl_k3": PolicyLossSettings(kl_loss_coef=0.2, kl_loss_type="k3"),
    "kl_low_var": PolicyLossSettings(kl_loss_coef=0.2, kl_loss_type="low_var_kl"),
    "kl_unbiased": PolicyLossSettings(kl_loss_coef=0.2, kl_loss_type="k3", use_unbiased_kl=True),
    "tis": PolicyLossSettings(correction=ImportanceCorrection(0.5, 1.5)),
    "tis_threshold": PolicyLossSettings(correction=ImportanceCorrection.within_threshold(0.8)),
    "tis_sequence": PolicyLossSettings(correction=ImportanceCorrection(0.5, 3.0, level="sequence")),
    "tis_geometric": PolicyLossSettings(correction=ImportanceCorrection(0.9, 1.1, level="geometric")),
    "icepop": PolicyLossSettings(correction=ImportanceCorrection(0.7, 1.6, "mask")),
    "mis_sequence": PolicyLossSettings(correction=ImportanceCorrection(0.2, 4.0, "mask", "sequence")),
    "rs_token": PolicyLossSettings(rejection=Rejection("token", 0.6, 1.5)),
    "rs_sequence": PolicyLossSettings(rejection=Rejection("sequence", 0.5, 4.0)),
    "rs_geometric": PolicyLossSettings(rejection=Rejection("geometric", 0.9, 1.2)),
    "veto": PolicyLossSettings(rejection=Rejection("token", 0.0, 1e9, veto=0.45)),
    "tis_and_rs": PolicyLossSettings(
        correction=ImportanceCorrection(0.0, 1.2, level="geometric"),
        rejection=Rejection("token", 0.5, 2.0, veto=0.3),
        kl_loss_coef=0.3,
        entropy_coef=0.1,
    ),
    "opsm": PolicyLossSettings(opsm_delta=1e-4),
    "all": PolicyLossSettings(
        clip=ClipRange(0.1, 0.2, dual=3.0),
        kl_loss_coef=0.1,
        kl_loss_type="k3",
        use_unbiased_kl=True,
        entropy_coef=0.01,
        correction=ImportanceCorrection(0.7, 1.2),
        opsm_delta=0.05,
    ),
}


@pytest.mark.parametrize("reduction", ["rollout_mean", "token_mean", "constant"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_policy_loss_and_gradient_equal_the_reference(variant: str, reduction: str) -> None:
    settings = VARIANTS[variant]
    step = make_step()
    expected = reference_policy_loss(step, settings, reduction)
    expected_gradient = gradients(expected, step)
    _, whole_metrics = packed_losses(step, settings, reduction, CUTS[0])
    for cut in CUTS:
        loss, metrics = packed_losses(step, settings, reduction, cut)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradients(loss, step), expected_gradient, atol=1e-6, rtol=1e-6)
        assert metrics == pytest.approx(whole_metrics, abs=1e-6)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "plain"])
def test_every_variant_changes_the_loss(variant: str) -> None:
    plain, _ = packed_losses(make_step(), VARIANTS["plain"], "rollout_mean", CUTS[0])
    loss, _ = packed_losses(make_step(), VARIANTS[variant], "rollout_mean", CUTS[0])
    assert (loss - plain).abs().item() > 1e-5


@pytest.mark.parametrize("reduction", ["rollout_mean", "token_mean"])
def test_sft_loss_is_the_mean_negative_log_likelihood(reduction: str) -> None:
    step = make_step()
    weights = reference_weights(step, reduction)
    expected = -sum(
        w * step.log_probs[i][t] for i, row in enumerate(weights) for t, w in enumerate(row) if w > 0
    )
    expected_gradient = gradients(expected, step)
    for cut in CUTS:
        loss, metrics = packed_losses(step, None, reduction, cut)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradients(loss, step), expected_gradient, atol=1e-6, rtol=1e-6)
        assert metrics["loss"] == pytest.approx(expected.item(), abs=1e-6)


def test_any_shuffle_of_the_sequences_gives_the_same_loss() -> None:
    step, rng = make_step(), random.Random(0)
    expected, _ = packed_losses(step, VARIANTS["all"], "rollout_mean", CUTS[0])
    for _ in range(5):
        order = rng.sample(range(8), 8)
        cut = rng.randrange(1, 8)
        loss, _ = packed_losses(step, VARIANTS["all"], "rollout_mean", [order[:cut], order[cut:]])
        torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-9)
