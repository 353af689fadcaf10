"""Attention of short segments in fp32, compiled, from projected heads to what the output projection reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.attention import Attention
from miles.models.compiled.library import Heads, Library, addresses, plain
from miles.models.segment_attention import SegmentAttention, most_visible, pays_in_segments
from miles.models.sparse_attention import SparseAttention

HEAD_STEP = 16
"""Head widths that are whole vectors on every machine."""
MOST_VISIBLE = 96
"""Visible tokens; gradients of longer sequences are quicker in torch's blocked kernel, measured as `LONGEST`
of `numerics`."""


class CompiledAttention:
    """Implements `attention.HeadAttention`; other layers than it takes go through torch's.

    Args:
        starts: int64 [M + 1], segment i is tokens starts[i] : starts[i + 1].
        prompts: int64 [M], the segment that each one continues; -1 for none.
        in_torch: the same attention in torch.
    """

    def __init__(
        self, library: Library, starts: Tensor, prompts: Tensor, in_torch: Callable[[], Attention]
    ) -> None:
        self._library, self._in_torch = library, in_torch
        self._starts, self._prompts = starts.long().contiguous(), prompts.long().contiguous()

    @cached_property
    def _torch(self) -> Attention:
        return self._in_torch()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        in_blocks = spec.is_plain and pays_in_segments(self._starts)
        return (self._blocks if in_blocks else self._torch).attend(layer, q, k, v, spec)

    def attend_sparse(
        self, layer: int, q: Tensor, rows: Tensor, index_q: Tensor, index_weights: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """See `sparse_attention.SparseAttention`."""
        in_torch = self._torch
        assert isinstance(in_torch, SparseAttention), "prompts of sparse models are not shared"
        return in_torch.attend_sparse(layer, q, rows, index_q, index_weights, spec)

    def takes(self, heads: Tensor, spec: AttentionSpec, norm_plus_one: bool) -> bool:
        """Whether `attend_heads` computes a layer of this kind."""
        whole = spec.rotary_width == spec.head_dim and spec.head_dim % HEAD_STEP == 0
        usual = spec.is_plain and spec.query_factor == 1.0 and spec.rotates
        usual = usual and not spec.rope.interleaved and not spec.qk_unit
        usual = usual and not spec.v_unit and spec.keys_of is None
        normed = not spec.qk_norm or (spec.qk_norm_over == "head" and not norm_plus_one)
        return whole and usual and normed and plain(heads)

    def attend_heads(
        self,
        heads: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rotation: Tensor,
        eps: float,
        spec: AttentionSpec,
    ) -> Tensor:
        """heads [T, H + 2 Hkv, d] as projected, rotation complex64 [T, d / 2] -> [T, H * d]."""
        if torch.is_grad_enabled():
            out: Tensor = _Attention.apply(heads, q_norm, k_norm, rotation, eps, spec, self)
            return out
        return self.forward(heads, q_norm, k_norm, rotation, eps, spec)[0]

    def describe(
        self,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rotation: Tensor,
        eps: float,
        spec: AttentionSpec,
    ) -> Heads:
        """What both directions read; the caller keeps the tensors alive."""
        counts = (len(rotation), spec.num_heads, spec.num_kv_heads, spec.head_dim, len(self._prompts))
        return Heads(*counts, *addresses(self._starts, self._prompts, q_norm, k_norm, rotation), eps)

    def forward(
        self,
        heads: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rotation: Tensor,
        eps: float,
        spec: AttentionSpec,
    ) -> tuple[Tensor, ...]:
        """The result, and for backward: turned queries and keys, 1 / rms of each, log-sums of scores."""
        heads, tokens = heads.contiguous(), heads.shape[0]
        turned = spec.num_heads + spec.num_kv_heads
        sizes = (spec.query_width, turned * spec.head_dim, turned, spec.num_heads)
        out, *kept = (heads.new_empty(tokens, size) for size in sizes)
        described = self.describe(q_norm, k_norm, rotation, eps, spec)
        self._library.attention(described, *addresses(heads, *kept, out))
        return out, *kept

    def backward(
        self, described: Heads, grad: Tensor, tensors: tuple[Tensor, ...], out: list[Tensor]
    ) -> None:
        """Gradients of heads and of both norms into `out`; `tensors`: heads and what `forward` gave."""
        if most_visible(self._starts, self._continued) > MOST_VISIBLE:
            self._backward_in_blocks(described, grad, tensors, out)
        else:
            self._library.attention_backward(described, *addresses(grad, *tensors, *out))

    def _backward_in_blocks(
        self, described: Heads, grad: Tensor, tensors: tuple[Tensor, ...], out: list[Tensor]
    ) -> None:
        """The same with torch's kernel between the turned heads and the result."""
        heads, turned, rstd, log_sums, result = tensors
        queries, keys, d = described.queries, described.keys, described.d
        q, k = turned.view(-1, queries + keys, d).split_with_sizes((queries, keys), 1)
        v = heads.view(-1, queries + 2 * keys, d)[:, queries + keys :]
        in_heads = (x.view(-1, queries, d) for x in (grad, result))
        # That kernel scales scores itself; these queries are scaled already.
        grads = self._blocks.backward(next(in_heads), q * d**0.5, k, v, next(in_heads), log_sums)
        grad_turned = torch.cat((grads[0] * d**0.5, grads[1]), 1)
        out[0].view(-1, queries + 2 * keys, d)[:, queries + keys :] = grads[2]
        self._library.heads_backward(described, *addresses(grad_turned, heads, rstd, *out))

    @cached_property
    def _continued(self) -> Tensor | None:
        """The prompts of the last segments, as `SegmentAttention` takes them."""
        continued = self._prompts[self._prompts >= 0]
        return continued if len(continued) else None

    @cached_property
    def _blocks(self) -> SegmentAttention:
        continued = self._continued
        return SegmentAttention(self._starts.numpy(), None if continued is None else continued.numpy())


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        rotation: Tensor,
        eps: float,
        spec: AttentionSpec,
        attention: CompiledAttention,
    ) -> Tensor:
        heads = heads.contiguous()
        out, *kept = attention.forward(heads, q_norm, k_norm, rotation, eps, spec)
        ctx.save_for_backward(q_norm, k_norm, rotation, heads, *kept, out)
        ctx.eps, ctx.spec, ctx.attention = eps, spec, attention
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_norm, k_norm, rotation, heads, *kept = ctx.saved_tensors
        described = ctx.attention.describe(q_norm, k_norm, rotation, ctx.eps, ctx.spec)
        grad, grad_heads = grad.contiguous(), torch.empty_like(heads)
        norms = [heads.new_zeros(ctx.spec.head_dim) for _ in range(2)]
        ctx.attention.backward(described, grad, (heads, *kept), [grad_heads, *norms])
        of_q, of_k = (None, None) if q_norm is None else norms
        return grad_heads, of_q, of_k, None, None, None, None
