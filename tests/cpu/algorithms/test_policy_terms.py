"""What the parts of the policy loss report, and what they do at their edges."""

from __future__ import annotations

import math

import pytest
import torch

from miles.algorithms.importance import ImportanceCorrection, bound_weights, importance_weights
from miles.algorithms.kl import approximate_kl
from miles.algorithms.losses import LossRows, PolicyLossSettings, policy_loss
from miles.algorithms.mismatch import log_prob_gap
from miles.algorithms.policy_objective import ClipRange
from miles.algorithms.sequences import Sequences


def make_rows(log_probs, old, advantages, **more) -> LossRows:
    count = len(log_probs)
    return LossRows(
        log_probs_T=torch.tensor(log_probs, requires_grad=True),
        loss_mask_T=more.pop("loss_mask_T", torch.ones(count)),
        weights_T=torch.full((count,), 1 / count),
        sequences=Sequences(torch.tensor([0, count])),
        sequence_weight=1.0,
        old_log_probs_T=torch.tensor(old),
        advantages_T=torch.tensor(advantages),
        **more,
    )


def test_a_drift_beyond_20_is_bounded_and_counted() -> None:
    rows = make_rows([-1.0, -30.0, -1.0], [-1.0, -1.0, -31.5], [1.0, 1.0, 1.0])
    output = policy_loss(rows, PolicyLossSettings())
    assert output.metrics["log_ratio_bounded"].item() == 2
    assert torch.isfinite(output.loss)


def test_a_nan_is_never_replaced() -> None:
    output = policy_loss(make_rows([math.nan, -1.0], [-1.0, -1.0], [1.0, 1.0]), PolicyLossSettings())
    assert torch.isnan(output.loss)


def test_a_nan_on_a_masked_row_reaches_neither_loss_nor_gradient() -> None:
    rows = make_rows(
        [-1.0, -1.0],
        [-1.0, math.nan],
        [1.0, 0.0],
        loss_mask_T=torch.tensor([1.0, 0.0]),
        rollout_log_probs_T=torch.tensor([-1.0, math.nan]),
        reference_T=torch.tensor([-1.0, math.nan]),
    )
    rows.weights_T[1] = 0.0
    settings = PolicyLossSettings(kl_loss_coef=1.0, kl_loss_type="k3", correction=ImportanceCorrection())
    output = policy_loss(rows, settings)
    (gradient,) = torch.autograd.grad(output.loss, rows.log_probs_T)
    assert gradient.tolist() == [-0.5, 0.0]
    assert all(torch.isfinite(value) for value in output.metrics.values())


def test_on_policy_metrics_are_exact() -> None:
    metrics = policy_loss(make_rows([-1.0, -2.0], [-1.0, -2.0], [1.0, -1.0]), PolicyLossSettings()).metrics
    assert metrics["ppo_kl"].item() == 0
    assert metrics["pg_clipfrac"].item() == 0
    assert metrics["ess_ratio"].item() == 1


def test_clip_fraction_counts_where_the_clipped_branch_is_the_larger_one() -> None:
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, 1.0]
    rows = make_rows([math.log(r) for r in ratios], [0.0] * 5, advantages)
    metrics = policy_loss(rows, PolicyLossSettings(clip=ClipRange(0.2, 0.2))).metrics
    assert metrics["pg_clipfrac"].item() == pytest.approx(2 / 5)


def test_effective_sample_size_of_uneven_ratios() -> None:
    rows = make_rows([math.log(3.0), math.log(1.0)], [0.0, 0.0], [1.0, 1.0])
    metrics = policy_loss(rows, PolicyLossSettings()).metrics
    assert metrics["ess_ratio"].item() == pytest.approx(16 / (2 * 10))


def test_terms_that_are_off_report_nothing() -> None:
    metrics = policy_loss(make_rows([-1.0], [-1.0], [1.0]), PolicyLossSettings()).metrics
    assert {"entropy", "kl_loss", "tis", "ois", "opsm_clipfrac"}.isdisjoint(metrics)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    def gradient(objective: str) -> float:
        rows = make_rows([math.log(2.0)], [0.0], [1.0])
        loss = policy_loss(rows, PolicyLossSettings(objective=objective, clip=ClipRange(0.2, 0.2))).loss
        return torch.autograd.grad(loss, rows.log_probs_T)[0].item()

    assert gradient("clip") == 0
    assert gradient("cispo") == pytest.approx(-1.2)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_kl_estimators_vanish_at_equal_policies_and_average_to_the_divergence(kind: str) -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.45, 0.33, 0.22], dtype=torch.float64)
    assert approximate_kl(p.log(), p.log(), kind).abs().max() == 0
    divergence = (p * (p / q).log()).sum()
    estimate = (p * approximate_kl(p.log(), q.log(), kind)).sum()
    assert estimate.item() == pytest.approx(divergence.item(), rel=0.05)


def test_low_var_kl_is_bounded_where_k3_is_not() -> None:
    policy, reference = torch.tensor([-10.0]), torch.tensor([-1.0])
    assert approximate_kl(policy, reference, "low_var_kl").item() == 10.0
    assert approximate_kl(policy, reference, "k3").item() == pytest.approx(math.exp(9) - 10, rel=1e-5)


def test_importance_weights_are_clamped_or_masked() -> None:
    log_ratio = torch.log(torch.tensor([0.5, 0.95, 3.0]))
    weights = importance_weights(log_ratio, torch.ones(3), Sequences(torch.tensor([0, 3]))).value_T
    clamped = bound_weights(weights, ImportanceCorrection(0.0, 2.0))
    assert clamped.tolist() == pytest.approx([0.5, 0.95, 2.0])
    masked = bound_weights(weights, ImportanceCorrection.within_threshold(0.9))
    assert masked.tolist() == pytest.approx([0.0, 0.95, 0.0])


def test_correction_metrics_say_how_much_was_cut() -> None:
    rows = make_rows(
        [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], rollout_log_probs_T=-torch.log(torch.tensor([4.0, 1.0]))
    )
    settings = PolicyLossSettings(correction=ImportanceCorrection(0.0, 2.0))
    metrics = policy_loss(rows, settings).metrics
    assert metrics["tis"].item() == pytest.approx(2.5)
    assert metrics["tis_clipfrac"].item() == pytest.approx(0.5)
    assert metrics["tis_abs"].item() == pytest.approx(1.5)
    assert metrics["pg_loss"].item() == pytest.approx(-1.5)


def test_opsm_drops_only_negative_advantages_of_drifted_sequences() -> None:
    rows = make_rows([-1.5, -1.5], [-1.0, -1.0], [-1.0, 2.0])
    metrics = policy_loss(rows, PolicyLossSettings(opsm_delta=0.1)).metrics
    assert metrics["opsm_clipfrac"].item() == pytest.approx(0.5)
    assert metrics["pg_loss"].item() == pytest.approx(-math.exp(-0.5))


def test_log_prob_gap_reports_mean_and_tail() -> None:
    train = torch.zeros(200)
    rollout = torch.full((200,), 0.01)
    rollout[3], rollout[4], rollout[5] = -1.0, math.nan, 0.5
    mask = torch.ones(200)
    mask[5] = 0
    gap = {name: value.item() for name, value in log_prob_gap(train, rollout, mask).items()}
    assert gap["abs_diff"] == pytest.approx((197 * 0.01 + 1.0) / 198, rel=1e-5)
    assert gap["abs_diff_max"] == 1.0
    assert gap["abs_diff_p99"] == pytest.approx(0.01)
    assert gap["ratio_above_2"] == pytest.approx(1 / 198)
    k3 = (197 * (math.exp(-0.01) - 1 + 0.01) + math.e - 2) / 198
    assert gap["kl"] == pytest.approx(k3, rel=1e-3)


def test_log_prob_gap_is_absent_without_engine_log_probs() -> None:
    assert log_prob_gap(torch.zeros(2), torch.full((2,), math.nan), torch.ones(2)) == {}
