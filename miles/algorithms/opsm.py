"""Off-policy sequence masking: drop what a sequence that drifted too far would push down.

Source: DeepSeek-V3.2 report (arXiv 2512.02556); slime `utils/ppo_utils.py`.
"""

from __future__ import annotations

from torch import Tensor

from miles.algorithms.sequences import Sequences


def off_policy_mask(
    drift_T: Tensor, advantages_T: Tensor, loss_mask_T: Tensor, sequences: Sequences, delta: float
) -> Tensor:
    """float32 [T]: 0 for tokens of negative advantage in sequences whose mean `lp_old - lp` exceeds delta."""
    mean_drift_N = sequences.mean(drift_T.detach(), loss_mask_T)
    dropped_T = (advantages_T < 0) & (sequences.expand(mean_drift_N) > delta)
    return (~dropped_T).to(drift_T.dtype)
