"""What is done, or only measured, about the gap between trainer and engine in one micro-batch.

A sequence lies whole in one micro-batch, so what looks at sequences does not depend on how a step is cut;
what looks at the whole step (`scale`) is computed before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miles.algorithms.importance import ImportanceCorrection, bound_weights, importance_weights, log_ratio
from miles.algorithms.mismatch import perplexity_gap
from miles.algorithms.rejection import Rejection, reject
from miles.algorithms.sequences import Sequences


@dataclass(frozen=True)
class CorrectionRows:
    """What a correction reads: float [T] rows of N sequences, without gradient but for `pg_loss_T`."""

    pg_loss_T: Tensor
    old_log_probs_T: Tensor
    rollout_log_probs_T: Tensor
    loss_mask_T: Tensor
    sequences: Sequences


@dataclass(frozen=True)
class Corrected:
    """The policy-gradient loss [T] after the correction, which tokens stay in the loss (float [T]), and
    metrics: of tokens [T], to be averaged, and counts, to be added up.
    """

    pg_loss_T: Tensor
    kept_T: Tensor
    means_T: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)


CustomCorrection = Callable[[CorrectionRows], Corrected]


def correct(
    rows: CorrectionRows,
    correction: ImportanceCorrection | None,
    rejection: Rejection | None,
    scale: float = 1.0,
    *,
    perplexities: bool = False,
) -> Corrected:
    """Weights and rejection; `scale` divides the weights (`importance.mean_weight`).

    A token that importance masking leaves out has no policy gradient; a rejected one has no part in the loss
    at all. Reductions keep their denominators.
    """
    log_ratio_T = log_ratio(rows.old_log_probs_T, rows.rollout_log_probs_T)
    mask_T, sequences = rows.loss_mask_T, rows.sequences
    loss_T, kept_T = rows.pg_loss_T, torch.ones_like(mask_T)
    means_T: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    if correction is not None:
        weights = importance_weights(log_ratio_T, mask_T, sequences, correction.level)
        factor_T = bound_weights(weights.value_T, correction)
        means_T["tis"] = weights.value_T
        means_T["tis_clipfrac"] = (factor_T != weights.value_T).to(mask_T.dtype)
        means_T["tis_abs"] = (weights.value_T - 1).abs()
        counts["tis_bounded"] = weights.num_bounded
        if correction.applied:
            loss_T = loss_T * (factor_T / scale)
    if rejection is not None:
        rejected = reject(log_ratio_T, mask_T, sequences, rejection)
        means_T["rs_frac"] = 1 - rejected.kept_T
        if rejected.veto_T is not None:
            means_T["rs_veto_frac"] = rejected.veto_T
        if rejection.applied:
            kept_T = rejected.kept_T
    if perplexities:
        means_T |= perplexity_gap(rows.old_log_probs_T.detach(), rows.rollout_log_probs_T, mask_T, sequences)
    return Corrected(loss_T, kept_T, means_T, counts)
