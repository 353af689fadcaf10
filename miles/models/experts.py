"""Running the chosen experts: tokens sorted by expert, one grouped matrix product per projection.

Shapes: T tokens, k experts per token, E experts, D hidden, I expert width, R = T * k rows sorted by expert,
P >= R rows where groups are filled up. Outputs return to their (token, slot) place and are added in slot
order: no scatter-add, so the sum of a token does not depend on the other tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles.models.expert_rows import ExpertRows, filled_rows, sorted_rows
from miles.models.grouped import grouped_mm, grouped_outer
from miles.models.invariant import bmm
from miles.models.row_blocks import RowBlocks, products
from miles.models.swiglu import Forward, swiglu_backward, swiglu_forward

Whole = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertKernels:
    """What of the computation may be chosen.

    Attributes:
        blocks: groups are filled up to such blocks with copies of the first token, whose results nobody reads
            (`filled_rows`). None: each group at once.
        activation: [P, 2I] -> [P, I] without autograd.
        rounded: [P, I] -> what the second projection multiplies; None: as it is. Backward passes straight
            through it.
        fused_sum: one rounding per added slot instead of two where the machine has it.
        whole: takes x, ids, weights, gate_up and down, and computes everything where nothing is `rounded`.
    """

    blocks: RowBlocks | None = None
    activation: Forward = swiglu_forward
    rounded: Forward | None = None
    fused_sum: bool = True
    whole: Whole | None = None


FAST = ExpertKernels()


def routed_experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, kernels: ExpertKernels = FAST
) -> Tensor:
    """Σ_slot weights[t, slot] · expert_ids[t, slot](x[t]).

    Args:
        x: [T, D]. ids: int64 [T, k]. weights: [T, k], x's dtype.
        gate_up: [E, 2I, D]. down: [E, D, I].

    Returns:
        [T, D].
    """
    if kernels.whole is not None and kernels.rounded is None:
        return kernels.whole(x, ids, weights, gate_up, down)
    rows = _group_by_expert(ids, gate_up, kernels.blocks)
    if torch.is_grad_enabled():
        return _RoutedExperts.apply(x, weights, gate_up, down, rows, kernels)
    return _forward(x, weights, gate_up, down, rows, kernels)[0]


def scaled_inputs(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, kernels: ExpertKernels = FAST
) -> Tensor:
    """Σ_slot expert_ids[t, slot](weights[t, slot] · x[t]); arguments as in `routed_experts`. A token is a row
    of its own for each of its experts.
    """
    rows = (x.unsqueeze(1) * weights.unsqueeze(2)).flatten(0, 1)
    out = routed_experts(rows, ids.reshape(-1, 1), torch.ones_like(rows[:, :1]), gate_up, down, kernels)
    return _sum_slots(out.view(len(x), -1, x.shape[1]))


def _group_by_expert(ids: Tensor, gate_up: Tensor, blocks: RowBlocks | None) -> ExpertRows:
    num_experts = gate_up.shape[0]
    if blocks is None:
        return sorted_rows(ids, num_experts)
    # Backward needs groups without rows of experts that nobody chose.
    batched = ids.device.type == "cpu" and not torch.is_grad_enabled()
    return filled_rows(ids, num_experts, blocks, gate_up[0].numel() if batched else 0)


def _project(rows: Tensor, matrices: Tensor, layout: ExpertRows, blocks: RowBlocks | None) -> Tensor:
    """rows [P, A] of each group times its expert's [B, A]ᵀ -> [P, B]."""
    if blocks is None:
        assert layout.ends is not None
        return grouped_mm(rows, matrices.transpose(1, 2), layout.ends)
    if layout.width is not None and blocks.dtype == rows.dtype == matrices.dtype:
        # On few rows every call that changes nothing would show.
        groups = rows.view(len(matrices), layout.width, -1)
        return bmm(groups, matrices.transpose(1, 2)).view(len(rows), -1)
    rows, matrices_T = rows.to(blocks.dtype), matrices.to(blocks.dtype).transpose(1, 2)
    if layout.width is not None:
        out = bmm(rows.unflatten(0, (-1, layout.width)), matrices_T).flatten(0, 1)
        return out.to(matrices.dtype)
    assert layout.cut is not None and layout.ends is not None
    if rows.device.type == "cpu" and all(size < blocks.sizes[-1] for _, size in layout.cut):
        # Every group is one block, and on a CPU grouped_mm is one `mm` per group.
        out = grouped_mm(rows, matrices_T, layout.ends)
    else:
        each = matrices_T.unbind()
        out = products(rows, [each[expert] for expert, _ in layout.cut], [size for _, size in layout.cut])
    return out.to(matrices.dtype)


def _forward(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, rows: ExpertRows, kernels: ExpertKernels
) -> tuple[Tensor, Tensor]:
    """The result [T, D], and the experts' first projection [P, 2I]."""
    top_k = weights.shape[1]
    projected = _project(x.index_select(0, rows.tokens), gate_up, rows, kernels.blocks)
    active_PI = _rounded(kernels.activation(projected), kernels)
    out_PD = _project(active_PI, down, rows, kernels.blocks)
    slots = out_PD.index_select(0, rows.place).view(-1, top_k, x.shape[1])
    if not kernels.fused_sum:
        return _sum_slots(slots.mul_(weights.unsqueeze(2))), projected
    total = slots[:, 0] * weights[:, :1]
    for slot in range(1, top_k):
        total.addcmul_(slots[:, slot], weights[:, slot : slot + 1])
    return total, projected


class _RoutedExperts(torch.autograd.Function):
    """Keeps x and the first projection for backward; the gathered rows and activations are computed again.
    Rows that fill up a group have weight 0 and so no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        rows: ExpertRows,
        kernels: ExpertKernels,
    ) -> Tensor:
        assert rows.ends is not None
        total, projected = _forward(x, weights, gate_up, down, rows, kernels)
        ctx.save_for_backward(x, weights, gate_up, down, projected)
        ctx.rows, ctx.kernels = rows, kernels
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, projected = ctx.saved_tensors
        tokens, place, ends = ctx.rows.tokens, ctx.rows.place, ctx.rows.ends
        top_k = weights.shape[1]
        weight_P1 = weights.new_zeros(len(tokens), 1).index_copy_(0, place, weights.reshape(-1, 1))
        grad_PD = grad.index_select(0, tokens)
        active_PI = _rounded(swiglu_forward(projected), ctx.kernels)
        # d out[r] / d weight[r] = <down @ active[r], grad[r]> = <active[r], grad[r] @ down>
        grad_active = grouped_mm(grad_PD, down, ends)
        grad_weights = (grad_active * active_PI).sum(-1).index_select(0, place).view_as(weights)
        grad_down = grouped_outer(grad_PD, active_PI.mul_(weight_P1), ends)
        grad_projected = swiglu_backward(grad_active.mul_(weight_P1), projected)
        grad_gate_up = grouped_outer(grad_projected, x.index_select(0, tokens), ends)
        grad_slots = grouped_mm(grad_projected, gate_up, ends).index_select(0, place)
        grad_x = _sum_slots(grad_slots.view(-1, top_k, x.shape[1]))
        return grad_x, grad_weights, grad_gate_up, grad_down, None, None


def _rounded(active_PI: Tensor, kernels: ExpertKernels) -> Tensor:
    return active_PI if kernels.rounded is None else kernels.rounded(active_PI)


def _sum_slots(slots: Tensor) -> Tensor:
    """[T, k, D] -> [T, D], slot after slot: faster on CPU than a reduction over a short middle dimension."""
    total = slots[:, 0]
    for slot in range(1, slots.shape[1]):
        total = total + slots[:, slot]
    return total
