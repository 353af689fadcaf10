"""Attention of packed sequences, and of samples that share prompts, whose scores never exist as a whole.

The flat tokens are segments, one after another. A token sees its own segment up to itself and, where its
segment continues a prompt, all of that prompt. Segments of like length go through torch's blocked CPU kernel
together; what a token saw in its segment and in its prompt is merged by the two log-sums of exponentials, and
backward runs the same kernel on the merged ones (https://arxiv.org/abs/2310.01889 does so across devices).

Shapes: T tokens, M segments, H query heads, Hkv key/value heads, d head width; m and W as in `row_grids`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.row_grids import RowGrids, row_grid

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


SHORT = 32
"""Tokens. Where no segment is longer, all scores at once (`PackedAttention`, `PrefixAttention`) are quicker
than a kernel that takes segments head by head."""


def pays_in_segments(cu_seqlens: Tensor) -> bool:
    """Whether `SegmentAttention` takes these segments, on the device of `cu_seqlens`, and is the quickest
    that torch has."""
    return cu_seqlens.device.type == "cpu" and int(cu_seqlens.diff().max()) > SHORT


def most_visible(cu_seqlens: Tensor, prompt_of: Tensor | None) -> int:
    """Tokens that some token sees, itself included; arguments as those of `SegmentAttention`."""
    lengths = cu_seqlens.diff()
    if prompt_of is not None and len(prompt_of):
        lengths = lengths.clone()
        lengths[-len(prompt_of) :] += lengths[prompt_of]
    return int(lengths.max())


class SegmentAttention:
    """For CPU tensors. Keeps its inputs, its output and fp32 [T, H] for backward.

    Args:
        cu_seqlens: [M + 1], segment i is tokens cu_seqlens[i] : cu_seqlens[i + 1]; none empty.
        prompt_of: int64 [M - G], ascending: the last M - G segments continue the first G, the prompts. None:
            no segment continues another.
    """

    def __init__(self, cu_seqlens: np.ndarray, prompt_of: np.ndarray | None = None) -> None:
        device = torch.device("cpu")
        starts, lengths = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens).astype(np.int64)
        self.segments = RowGrids(starts, lengths, device)
        self.continued: Continuations | None = None
        if prompt_of is not None:
            self.continued = Continuations(starts, lengths, prompt_of, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        if torch.is_grad_enabled() and q.requires_grad:
            out: Tensor = _SegmentAttention.apply(q, k, v, self)
        else:
            out = self.forward(q, k, v)[0]
        return out.flatten(1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [T, H, d] and, fp32 [T, H], the log of the sum of exponential scores."""
        pairs = [_forward(*(grid.take(x) for x in (q, k, v)), 0.0, True) for grid in self.segments.grids]
        out, log_sum = (self.segments.put([pair[i] for pair in pairs]) for i in (0, 1))
        if self.continued is not None:
            self.continued.add(out, log_sum, q, k, v)
        return out, log_sum

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k and v."""
        found = []
        for grid in self.segments.grids:
            inputs = (grid.take(x) for x in (q, k, v, out, log_sum))
            found.append(_backward(grid.take(grad, zero_padding=True), *inputs, 0.0, True))
        grads = tuple(self.segments.put([triple[i] for triple in found]) for i in range(3))
        if self.continued is not None:
            self.continued.add_gradients(grads, grad, q, k, v, out, log_sum)
        return grads


class Continuations:
    """What the segments that continue prompts see of them.

    All segments of a prompt are one range of queries; ranges of equally long prompts share a grid.
    """

    def __init__(
        self, starts: np.ndarray, lengths: np.ndarray, prompt_of: np.ndarray, device: torch.device
    ) -> None:
        first = len(lengths) - len(prompt_of)
        prompts, begins = np.unique(prompt_of, return_index=True)
        totals = np.add.reduceat(lengths[first:], begins)
        self.begin = int(starts[first])
        self.queries = RowGrids(starts[first:][begins], totals, device, groups=lengths[prompts])
        self.keys = [
            row_grid(starts[prompts[members]], lengths[prompts[members]], device)
            for members in self.queries.members
        ]

    def add(self, out: Tensor, log_sum: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Merge what the prompts give into the output and log-sums of the segments alone, in place."""
        pairs = [
            _forward(queries.take(q), keys.take(k), keys.take(v), 0.0, False)
            for queries, keys in zip(self.queries.grids, self.keys, strict=True)
        ]
        of_prompt, sum_of_prompt = (self.queries.put([pair[i] for pair in pairs]) for i in (0, 1))
        own, own_sum = out[self.begin :], log_sum[self.begin :]
        merged = torch.logaddexp(own_sum, sum_of_prompt)
        of_prompt = of_prompt * (sum_of_prompt - merged).exp_().unsqueeze(-1)
        own.copy_(of_prompt.addcmul_(own, (own_sum - merged).exp_().unsqueeze(-1)))
        own_sum.copy_(merged)

    def add_gradients(
        self,
        grads: tuple[Tensor, ...],
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        log_sum: Tensor,
    ) -> None:
        """Add to the gradients of q, k and v in place."""
        grad_q, grad_k, grad_v = grads
        of_queries = []
        for queries, keys in zip(self.queries.grids, self.keys, strict=True):
            grad_grid = queries.take(grad, zero_padding=True)
            outputs = (queries.take(x) for x in (out, log_sum))
            found = _backward(grad_grid, queries.take(q), keys.take(k), keys.take(v), *outputs, 0.0, False)
            of_queries.append(found[0])
            keys.add_to(grad_k, found[1])
            keys.add_to(grad_v, found[2])
        grad_q[self.begin :] += self.queries.put(of_queries)


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: SegmentAttention) -> Tensor:
        out, log_sum = attention.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.attention = attention
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.attention.backward(grad, *ctx.saved_tensors), None
