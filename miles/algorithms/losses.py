"""The losses: policy loss with its KL, entropy and correction terms, and the SFT loss.

Every metric is a sum of weighted values, so adding the metrics of micro-batches gives the metrics of the
step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from miles.algorithms.corrections import Corrected, CorrectionRows, CustomCorrection, correct
from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.kl import KlKind, approximate_kl
from miles.algorithms.opsm import off_policy_mask
from miles.algorithms.policy_objective import (
    ClipRange,
    Objective,
    Ratio,
    policy_gradient_loss,
    probability_ratio,
)
from miles.algorithms.rejection import Rejection
from miles.algorithms.sequences import Sequences


@dataclass(frozen=True)
class PolicyLossSettings:
    """Coefficients and variants of the policy loss."""

    objective: Objective = "clip"
    clip: ClipRange = field(default_factory=ClipRange)
    kl_loss_coef: float = 0.0
    kl_loss_type: KlKind = "k1"
    use_unbiased_kl: bool = False
    entropy_coef: float = 0.0
    correction: ImportanceCorrection | None = None
    rejection: Rejection | None = None
    mismatch_metrics: bool = False
    custom_correction: CustomCorrection | None = None
    """Takes the place of `correction` and `rejection`."""
    opsm_delta: float | None = None

    @property
    def reads_rollout_log_probs(self) -> bool:
        """Whether the loss, or what it reports, needs the engine's log-prob of every trained token."""
        corrects = self.correction or self.rejection or self.custom_correction
        return corrects is not None or self.mismatch_metrics

    @property
    def normalizes_weights(self) -> bool:
        """Whether importance weights are divided by their mean over the step."""
        correction = self.correction
        return correction is not None and correction.applied and correction.batch_normalize


@dataclass(frozen=True)
class LossRows:
    """Rows of one micro-batch, T rows of N sequences, all float32 [T] unless said otherwise.

    `weights_T` come from `reductions.token_weights` over the whole step, `weight_scale` from
    `importance.mean_weight`, and `sequence_weight` is 1 / (sequences of the step). `log_probs_T` and
    `entropy_T` carry gradient; the rest does not. On masked rows the old, engine and reference log-probs may
    be NaN, everything else is finite. `reference_T` switches the KL term on.
    """

    log_probs_T: Tensor
    loss_mask_T: Tensor
    weights_T: Tensor
    sequences: Sequences
    sequence_weight: float
    old_log_probs_T: Tensor | None = None
    advantages_T: Tensor | None = None
    rollout_log_probs_T: Tensor | None = None
    reference_T: Tensor | None = None
    entropy_T: Tensor | None = None
    weight_scale: float = 1.0
    pg_weights_T: Tensor | None = None
    """In place of `weights_T` for the policy-gradient term."""


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss with gradient, and additive metrics without."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(rows: LossRows, settings: PolicyLossSettings) -> LossOutput:
    """Policy-gradient loss - entropy_coef * entropy + kl_loss_coef * KL, reduced with `rows.weights_T`.

    Metrics: loss, pg_loss, pg_clipfrac, ppo_kl (mean lp_old - lp), ess_ratio (per sequence
    (sum r)^2 / (n sum r^2)), log_ratio_bounded (count), and with their terms kl_loss, entropy,
    opsm_clipfrac, ois, tis_scale and what `corrections.correct` reports. Rejected tokens leave the loss and
    pg_loss; all other metrics are means over all tokens.
    """
    rows = _fill_masked_rows(rows)
    assert rows.old_log_probs_T is not None and rows.advantages_T is not None
    ratio = probability_ratio(
        rows.log_probs_T, rows.old_log_probs_T, rows.loss_mask_T, rows.sequences, settings.objective
    )
    loss_T, metrics = _policy_gradient(rows, ratio, settings)
    everything, kept_T = rows, torch.ones_like(rows.weights_T)
    if settings.reads_rollout_log_probs:
        corrected = _correct(rows, loss_T, settings)
        metrics |= _correction_metrics(rows, ratio, corrected, settings)
        loss_T, kept_T = corrected.pg_loss_T, corrected.kept_T
        rows = replace(rows, weights_T=rows.weights_T * kept_T)
    own_T = rows.pg_weights_T
    loss = _reduce(rows, loss_T) if own_T is None else (own_T * kept_T * loss_T).sum()
    metrics["pg_loss"] = loss.detach()
    if rows.entropy_T is not None:
        metrics["entropy"] = _weighted(everything, rows.entropy_T)
        if settings.entropy_coef != 0:
            loss = loss - settings.entropy_coef * _reduce(rows, rows.entropy_T)
    if rows.reference_T is not None:
        kl_T = _kl_to_reference(rows, settings)
        metrics["kl_loss"] = _weighted(everything, kl_T)
        if settings.kl_loss_coef != 0:
            loss = loss + settings.kl_loss_coef * _reduce(rows, kl_T)
    metrics["loss"] = loss.detach()
    return LossOutput(loss, metrics)


def sft_loss(rows: LossRows) -> LossOutput:
    """Mean negative log-likelihood of the unmasked tokens under `rows.weights_T`."""
    loss = _reduce(rows, -rows.log_probs_T)
    metrics = {"loss": loss.detach()}
    if rows.entropy_T is not None:
        metrics["entropy"] = _weighted(rows, rows.entropy_T)
    return LossOutput(loss, metrics)


def _reduce(rows: LossRows, values_T: Tensor) -> Tensor:
    return (rows.weights_T * values_T).sum()


def _weighted(rows: LossRows, values_T: Tensor) -> Tensor:
    return _reduce(rows, values_T.detach())


def _fill_masked_rows(rows: LossRows) -> LossRows:
    """Old, reference and engine log-probs may be NaN on masked rows; there they become the policy's own."""
    masked_T, own_T = rows.loss_mask_T == 0, rows.log_probs_T.detach()

    def fill(values_T: Tensor | None) -> Tensor | None:
        return None if values_T is None else torch.where(masked_T, own_T, values_T)

    return replace(
        rows,
        old_log_probs_T=fill(rows.old_log_probs_T),
        rollout_log_probs_T=fill(rows.rollout_log_probs_T),
        reference_T=fill(rows.reference_T),
    )


def _policy_gradient(
    rows: LossRows, ratio: Ratio, settings: PolicyLossSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy-gradient loss per token [T] after masking, with its metrics."""
    assert rows.advantages_T is not None
    loss_T, clipped_T = policy_gradient_loss(
        ratio, rows.log_probs_T, rows.advantages_T, settings.objective, settings.clip
    )
    metrics = {
        "pg_clipfrac": _weighted(rows, clipped_T),
        "ppo_kl": _weighted(rows, ratio.drift_T),
        "ess_ratio": _effective_sample_size(rows, ratio),
        "log_ratio_bounded": ratio.num_bounded,
    }
    if settings.opsm_delta is not None:
        kept_T = off_policy_mask(
            ratio.drift_T, rows.advantages_T, rows.loss_mask_T, rows.sequences, settings.opsm_delta
        )
        loss_T = loss_T * kept_T
        metrics["opsm_clipfrac"] = _weighted(rows, 1 - kept_T)
    return loss_T, metrics


def _effective_sample_size(rows: LossRows, ratio: Ratio) -> Tensor:
    ratio_T = ratio.value_T.detach() * rows.loss_mask_T
    count_N = rows.sequences.sum(rows.loss_mask_T)
    total_N, squares_N = rows.sequences.sum(ratio_T), rows.sequences.sum(ratio_T.square())
    share_N = total_N.square() / (count_N * squares_N)
    return share_N.masked_fill(count_N == 0, 0.0).sum() * rows.sequence_weight


def _kl_to_reference(rows: LossRows, settings: PolicyLossSettings) -> Tensor:
    assert rows.reference_T is not None and rows.old_log_probs_T is not None
    importance_T = torch.exp(rows.log_probs_T - rows.old_log_probs_T) if settings.use_unbiased_kl else None
    return approximate_kl(rows.log_probs_T, rows.reference_T, settings.kl_loss_type, importance_T)


def _correct(rows: LossRows, pg_loss_T: Tensor, settings: PolicyLossSettings) -> Corrected:
    assert rows.rollout_log_probs_T is not None and rows.old_log_probs_T is not None
    given = CorrectionRows(
        pg_loss_T, rows.old_log_probs_T, rows.rollout_log_probs_T, rows.loss_mask_T, rows.sequences
    )
    corrected = correct(
        given,
        settings.correction,
        settings.rejection,
        rows.weight_scale,
        perplexities=settings.mismatch_metrics,
    )
    if settings.custom_correction is None:
        return corrected
    own = settings.custom_correction(given)
    return replace(own, means_T=corrected.means_T | own.means_T, counts=corrected.counts | own.counts)


def _correction_metrics(
    rows: LossRows, ratio: Ratio, corrected: Corrected, settings: PolicyLossSettings
) -> dict[str, Tensor]:
    metrics = {name: _weighted(rows, values_T) for name, values_T in corrected.means_T.items()}
    metrics |= corrected.counts
    if settings.correction is not None:
        metrics["ois"] = _weighted(rows, ratio.value_T)
    if settings.normalizes_weights:
        share = rows.sequences.count * rows.sequence_weight
        metrics["tis_scale"] = rows.weights_T.new_tensor(share * rows.weight_scale)
    return metrics
