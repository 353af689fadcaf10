"""Estimators of the KL divergence between the policy and a reference, per token.

Source: Schulman, "Approximating KL divergence" (2020); the importance-weighted form is DeepSeek-V3.2's.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlKind = Literal["k1", "k2", "k3", "low_var_kl"]

LOW_VAR_LOG_RATIO_BOUND = 20.0
LOW_VAR_KL_BOUND = 10.0


def approximate_kl(
    log_probs_T: Tensor, reference_T: Tensor, kind: KlKind, importance_ratio_T: Tensor | None = None
) -> Tensor:
    """KL(policy || reference) estimated at sampled tokens, float32 [T].

    k1 = lp - lp_ref; k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1; low_var_kl = k3 with the log-ratio bounded at
    +-20 and the value at +-10, the bounds being part of that estimator's definition.

    Args:
        importance_ratio_T: exp(lp - lp_old), which makes the estimate (and its gradient) unbiased when tokens
            were sampled from an older policy.
    """
    log_ratio_T = reference_T - log_probs_T
    if kind == "k1":
        kl_T = -log_ratio_T
    elif kind == "k2":
        kl_T = log_ratio_T.square() / 2
    elif kind == "k3":
        kl_T = torch.expm1(log_ratio_T) - log_ratio_T
    else:
        bounded_T = log_ratio_T.clamp(-LOW_VAR_LOG_RATIO_BOUND, LOW_VAR_LOG_RATIO_BOUND)
        kl_T = (torch.expm1(bounded_T) - bounded_T).clamp(-LOW_VAR_KL_BOUND, LOW_VAR_KL_BOUND)
    return kl_T if importance_ratio_T is None else importance_ratio_T * kl_T
