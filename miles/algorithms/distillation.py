"""On-policy distillation: the student learns from what a teacher thinks of the student's own tokens.

Source: Thinking Machines, "On-Policy Distillation" (2025); slime and miles `--use-opd`.
"""

from __future__ import annotations

from torch import Tensor


def reverse_kl(student_T: Tensor, teacher_T: Tensor, loss_mask_T: Tensor) -> Tensor:
    """lp_student - lp_teacher at the sampled tokens [T], whose mean is KL(student || teacher); 0 on untrained
    rows, where either may be NaN.
    """
    return (student_T - teacher_T).masked_fill(loss_mask_T == 0, 0.0)


def advised(advantages_T: Tensor, reverse_kl_T: Tensor, coef: float) -> Tensor:
    """A_t - coef * (lp_student - lp_teacher), after any estimator and before whitening."""
    return advantages_T - coef * reverse_kl_T
