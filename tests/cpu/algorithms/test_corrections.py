"""What corrections for off-policy data report and do at their edges; losses are held to formulas beside."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.algorithms.corrections import Corrected, CorrectionRows, correct
from miles.algorithms.importance import ImportanceCorrection, importance_weights, mean_weight
from miles.algorithms.losses import LossRows, PolicyLossSettings, policy_loss
from miles.algorithms.rejection import Rejection
from miles.algorithms.sequences import Sequences

LOG_RATIOS = [[0.4, -0.2, 0.1], [1.5, 2.0], [-0.3, 0.2, 0.9, -6.0]]
MASK = [[1, 0, 1], [1, 1], [1, 1, 1, 1]]


def rows() -> CorrectionRows:
    ratio_T = torch.cat([torch.tensor(ratios) for ratios in LOG_RATIOS])
    mask_T = torch.cat([torch.tensor(mask, dtype=torch.float) for mask in MASK])
    return CorrectionRows(
        pg_loss_T=torch.ones_like(ratio_T),
        old_log_probs_T=ratio_T - 3.0,
        rollout_log_probs_T=torch.full_like(ratio_T, -3.0),
        loss_mask_T=mask_T,
        sequences=Sequences(torch.tensor([0, 3, 5, 9])),
    )


def logs(level: str) -> list[float]:
    """Of every token, by numpy."""
    out: list[float] = []
    for ratios, mask in zip(LOG_RATIOS, MASK, strict=True):
        trained = np.array(ratios)[np.array(mask) > 0]
        whole = {"sequence": trained.sum(), "geometric": trained.mean()}
        out += ratios if level == "token" else [float(whole[level])] * len(ratios)
    return out


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_weights_of_a_level(level: str) -> None:
    given = rows()
    ratio_T = given.old_log_probs_T - given.rollout_log_probs_T
    weights = importance_weights(ratio_T, given.loss_mask_T, given.sequences, level)
    np.testing.assert_allclose(weights.value_T, np.exp(logs(level)), rtol=1e-5)
    assert weights.num_bounded == 0


def test_a_product_that_overflows_is_bounded_and_counted() -> None:
    ratio_T, sequences = torch.tensor([15.0, 14.0, -1.0]), Sequences(torch.tensor([0, 2, 3]))
    weights = importance_weights(ratio_T, torch.ones(3), sequences, "sequence")
    assert weights.value_T.tolist() == pytest.approx([math.exp(20)] * 2 + [math.exp(-1)])
    assert weights.num_bounded == 2


@pytest.mark.parametrize("outside", ["clamp", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_normalised_weights_have_mean_one_over_what_is_kept(level: str, outside: str) -> None:
    given = rows()
    correction = ImportanceCorrection(0.5, 2.0, outside, level, batch_normalize=True)
    ratio_T = given.old_log_probs_T - given.rollout_log_probs_T
    scale = mean_weight(ratio_T, given.loss_mask_T, given.sequences, correction)
    factor_T = correct(given, correction, None, scale).pg_loss_T
    counted = given.loss_mask_T > 0 if level == "token" else torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 0]) > 0
    if outside == "mask":
        counted &= factor_T != 0
    assert factor_T[counted].mean().item() == pytest.approx(1.0, rel=1e-5)


def test_with_everything_masked_nothing_is_scaled() -> None:
    given, correction = rows(), ImportanceCorrection(90.0, 99.0, "mask", batch_normalize=True)
    ratio_T = given.old_log_probs_T - given.rollout_log_probs_T
    assert mean_weight(ratio_T, given.loss_mask_T, given.sequences, correction) == 1.0


def test_rejection_and_veto_say_how_much_they_leave_out() -> None:
    rejected = correct(rows(), None, Rejection("token", 0.5, 2.0, veto=0.01))
    out_of_bounds = [abs(x) > math.log(2) for x in logs("token")]
    vetoed = [False] * 5 + [True] * 4
    expected = [float(a or b) for a, b in zip(out_of_bounds, vetoed, strict=True)]
    assert rejected.means_T["rs_frac"].tolist() == expected
    assert rejected.means_T["rs_veto_frac"].tolist() == [float(v) for v in vetoed]
    assert (1 - rejected.kept_T).tolist() == expected


def test_a_masked_token_neither_weighs_nor_vetoes() -> None:
    given = rows()
    given.old_log_probs_T[1] = -40.0  # not trained on
    kept_T = correct(given, None, Rejection("geometric", 0.5, 2.0, veto=1e-3)).kept_T
    assert kept_T.tolist() == [1.0] * 3 + [0.0] * 6


def test_a_measured_correction_changes_nothing() -> None:
    given = rows()
    measured = correct(
        given, ImportanceCorrection(applied=False), Rejection(applied=False), perplexities=True
    )
    applied = correct(given, ImportanceCorrection(), Rejection())
    assert torch.equal(measured.pg_loss_T, given.pg_loss_T) and measured.kept_T.all()
    assert all(torch.equal(measured.means_T[name], value) for name, value in applied.means_T.items())


def test_perplexities_of_both_sides() -> None:
    given = rows()
    means_T = correct(given, None, None, perplexities=True).means_T
    geometric = np.array(logs("geometric"))
    np.testing.assert_allclose(means_T["mis_rollout_ppl"], math.exp(3.0), rtol=1e-5)
    np.testing.assert_allclose(means_T["mis_training_ppl"], np.exp(3.0 - geometric), rtol=1e-5)
    np.testing.assert_allclose(means_T["mis_log_ppl_diff"], -geometric, atol=1e-6)
    np.testing.assert_allclose(means_T["mis_ppl_ratio"], np.exp(-geometric), rtol=1e-5)
    token = np.array(logs("token"))
    np.testing.assert_allclose(means_T["mis_k3_kl"], np.exp(token) - 1 - token, rtol=1e-4, atol=1e-6)


def test_a_function_of_the_users_stands_in_place() -> None:
    def halved(given: CorrectionRows) -> Corrected:
        kept_T = torch.zeros_like(given.loss_mask_T)
        kept_T[0] = 1
        return Corrected(given.pg_loss_T / 2, kept_T, {"custom/one": torch.ones_like(kept_T)})

    loss_rows = LossRows(
        log_probs_T=torch.tensor([-1.0, -1.0], requires_grad=True),
        loss_mask_T=torch.ones(2),
        weights_T=torch.full((2,), 0.5),
        sequences=Sequences(torch.tensor([0, 2])),
        sequence_weight=1.0,
        old_log_probs_T=torch.tensor([-1.0, -1.0]),
        advantages_T=torch.tensor([1.0, 1.0]),
        rollout_log_probs_T=torch.tensor([-1.0, -1.0]),
    )
    output = policy_loss(loss_rows, PolicyLossSettings(custom_correction=halved))
    assert output.loss.item() == pytest.approx(-0.25)
    own_weights = replace(loss_rows, pg_weights_T=torch.tensor([3.0, 5.0]))
    rejecting = policy_loss(own_weights, PolicyLossSettings(custom_correction=halved))
    assert rejecting.loss.item() == pytest.approx(-1.5), "weights of one's own, and the first token alone"
    assert output.metrics["custom/one"] == 1
