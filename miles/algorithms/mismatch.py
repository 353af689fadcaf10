"""How far the trainer's log-probs are from those the engine sampled with.

The k3 estimate of KL(rollout || train) and the absolute difference are the field's two numbers; the tail
(maximum, 99th percentile, share of tokens with ratio > 2) is what breaks Mixture-of-Experts runs first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miles.algorithms.sequences import Sequences

LOG_RATIO_ALARM = math.log(2.0)


def log_prob_gap(train_T: Tensor, rollout_T: Tensor, loss_mask_T: Tensor) -> dict[str, Tensor]:
    """Scalars over unmasked rows where the engine reported a log-prob (not NaN); empty when there is none.

    Keys: abs_diff (mean |difference|), abs_diff_max, abs_diff_p99 (nearest rank), kl (mean k3 of KL(rollout
    || train)), ratio_above_2 (share of tokens whose probabilities differ by more than a factor 2, either
    way).
    """
    seen_T = (loss_mask_T > 0) & ~torch.isnan(rollout_T)
    gap_S = train_T.detach()[seen_T].float() - rollout_T[seen_T].float()
    count = gap_S.numel()
    if count == 0:
        return {}
    absolute_S = gap_S.abs()
    rank = max(1, -(-99 * count // 100))
    return {
        "abs_diff": absolute_S.mean(),
        "abs_diff_max": absolute_S.max(),
        "abs_diff_p99": absolute_S.kthvalue(rank).values,
        "kl": (torch.expm1(gap_S) - gap_S).mean(),
        "ratio_above_2": (absolute_S > LOG_RATIO_ALARM).float().mean(),
    }


def perplexity_gap(
    train_T: Tensor, rollout_T: Tensor, loss_mask_T: Tensor, sequences: Sequences
) -> dict[str, Tensor]:
    """How both sides find the sampled responses, per token [T], a sequence's value on each of its tokens.

    Perplexities exp(-mean lp) of trainer and engine, their logarithms' difference (positive: the trainer
    finds the response less likely) and ratio, and the estimates k1 and k3 of KL(rollout || train). Names are
    those of miles' `train_infer_mismatch_helper`.
    """
    train_N, rollout_N = sequences.mean(train_T, loss_mask_T), sequences.mean(rollout_T, loss_mask_T)
    log_ratio_T = train_T - rollout_T
    of_sequences = {
        "mis_training_log_ppl": -train_N,
        "mis_rollout_log_ppl": -rollout_N,
        "mis_training_ppl": torch.exp(-train_N),
        "mis_rollout_ppl": torch.exp(-rollout_N),
        "mis_log_ppl_diff": rollout_N - train_N,
        "mis_log_ppl_abs_diff": (rollout_N - train_N).abs(),
        "mis_ppl_ratio": torch.exp(rollout_N - train_N),
    }
    return {name: sequences.expand(value_N) for name, value_N in of_sequences.items()} | {
        "mis_kl": -log_ratio_T,
        "mis_k3_kl": torch.expm1(log_ratio_T) - log_ratio_T,
    }
