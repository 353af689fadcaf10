"""Finding the first tensor that went bad, once a loss or gradient norm is not finite.

Nothing is replaced: the finding becomes an event, and the policy says whether the step is skipped or the
run ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NamedTensors = Iterable[tuple[str, Tensor]]


def find_non_finite(
    step: int,
    policy: str,
    weights: NamedTensors,
    loss_inputs: NamedTensors,
    gradients: NamedTensors,
    loss: float,
) -> dict[str, Any]:
    """An event for the record: what is not finite, where first, and in how many elements.

    Looks in the order in which a bad value travels: weights, what the loss read, gradients. Names are
    published ones. When all of them are finite, the loss itself is not or the norm overflowed.

    Returns:
        kind, step, policy, what (weight | loss_input | gradient | loss | gradient_norm), tensor (None for the
        last two), count (elements over all tensors of that kind), tensors (how many are affected).
    """
    event: dict[str, Any] = {"kind": "non_finite", "step": step, "policy": policy}
    for what, tensors in (("weight", weights), ("loss_input", loss_inputs), ("gradient", gradients)):
        bad = [(name, count) for name, tensor in tensors if (count := count_non_finite(tensor))]
        if bad:
            total = sum(count for _, count in bad)
            return event | {"what": what, "tensor": bad[0][0], "count": total, "tensors": len(bad)}
    what = "gradient_norm" if math.isfinite(loss) else "loss"
    return event | {"what": what, "tensor": None, "count": 1, "tensors": 0}


def count_non_finite(tensor: Tensor) -> int:
    """NaN and infinite elements."""
    return int((~torch.isfinite(tensor)).sum())
