"""Attention of samples that share prompts: every prompt passes the model once, whoever continues it.

The flat tokens are all prompts, one after another, then all continuations. A prompt token sees its prompt up
to itself; a token of a continuation sees the whole prompt and its own continuation up to itself.

Shapes: G prompts, N continuations, P longest prompt, C longest continuation, n most continuations of one, H
query heads, Hkv key/value heads, g = H / Hkv, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.attention import PackedAttention
from miles.models.token_grid import TokenGrid


class PrefixAttention:
    """Prompts with their continuations; scores are materialised, so sequences should be short.

    Args:
        prompt_cu_seqlens: [G + 1], prompt i is tokens prompt_cu_seqlens[i] : prompt_cu_seqlens[i + 1].
        own_cu_seqlens: [N + 1], the same for continuations, counted from the end of the prompts; none empty.
        prompt_of_own: int64 [N], ascending.
    """

    def __init__(self, prompt_cu_seqlens: Tensor, own_cu_seqlens: Tensor, prompt_of_own: Tensor) -> None:
        self._num_prompt_tokens = int(prompt_cu_seqlens[-1])
        self._prompts = PackedAttention(prompt_cu_seqlens)
        self._prompt_grid, self._own_grid = self._prompts.grid, TokenGrid(own_cu_seqlens)
        self._longest_own = int(self._own_grid.lengths.max())
        prompt_lengths = self._prompt_grid.lengths
        counts = torch.bincount(prompt_of_own, minlength=prompt_lengths.numel())
        self._most = int(counts.max())
        self._place = torch.arange(prompt_of_own.numel(), device=counts.device)
        self._place += (torch.arange(counts.numel(), device=counts.device) * self._most)[prompt_of_own]
        self._place -= (counts.cumsum(0) - counts)[prompt_of_own]
        self._full = prompt_of_own.numel() == counts.numel() * self._most
        steps = torch.arange(self._prompts.max_len, device=counts.device)
        self._beyond_prompt = steps >= prompt_lengths.unsqueeze(1)
        self._masks: tuple[Tensor, Tensor] | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        split = self._num_prompt_tokens
        prompts = [self._prompt_grid.lay_out(x[:split], self._prompts.max_len) for x in (q, k, v)]
        of_prompts = self._prompt_grid.flatten(self._prompts.explicit(*prompts))
        k_prompt, v_prompt = (x.flatten(0, 1) for x in prompts[1:])
        q_own, k_own, v_own = (self._own_grid.lay_out(x[split:], self._longest_own) for x in (q, k, v))
        batch, d = k_own.shape[0] * k_own.shape[1], spec.head_dim
        q_own, k_own, v_own = (x.view(batch, -1, d) for x in (q_own * d**-0.5, k_own, v_own))
        prompt_mask, causal_mask = self._additive_masks(q, spec)
        to_prompt = torch.baddbmm(
            prompt_mask, self._by_prompt(q_own, spec.num_kv_heads), k_prompt.transpose(1, 2)
        )
        to_own = torch.baddbmm(causal_mask, q_own, k_own.transpose(1, 2))
        scores = torch.cat([self._by_own(to_prompt, spec.num_kv_heads), to_own], -1)
        p_prompt, p_own = torch.softmax(scores, -1).split([self._prompts.max_len, self._longest_own], -1)
        from_prompt = torch.bmm(self._by_prompt(p_prompt, spec.num_kv_heads), v_prompt)
        out = torch.baddbmm(self._by_own(from_prompt, spec.num_kv_heads), p_own, v_own)
        of_own = self._own_grid.flatten(out.view(-1, spec.num_heads, self._longest_own, d))
        return torch.cat([of_prompts, of_own])

    def _by_prompt(self, x: Tensor, kv_heads: int) -> Tensor:
        """[N * Hkv, g * C, w] -> [G * Hkv, n * g * C, w]; places without a continuation are zero."""
        rows, width = x.shape[1:]
        x = x.view(-1, kv_heads, rows, width)
        if not self._full:
            places = x.new_zeros(self._beyond_prompt.shape[0] * self._most, kv_heads, rows, width)
            x = places.index_copy(0, self._place, x)
        x = x.view(-1, self._most, kv_heads, rows, width).transpose(1, 2)
        return x.reshape(-1, self._most * rows, width)

    def _by_own(self, x: Tensor, kv_heads: int) -> Tensor:
        """The way back: [G * Hkv, n * g * C, w] -> [N * Hkv, g * C, w]."""
        width = x.shape[2]
        x = x.view(-1, kv_heads, self._most, x.shape[1] // self._most, width).transpose(1, 2)
        x = x.flatten(0, 1)
        if not self._full:
            x = x.index_select(0, self._place)
        return x.reshape(-1, x.shape[2], width)

    def _additive_masks(self, like: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """-inf behind the end of a prompt [G * Hkv, 1, P], and ahead of a continuation's token [g * C, C]."""
        if self._masks is None:
            zero = torch.zeros((), dtype=like.dtype, device=like.device)
            beyond = zero.expand(self._beyond_prompt.shape).masked_fill(self._beyond_prompt, float("-inf"))
            ahead = torch.full((self._longest_own,) * 2, float("-inf"), dtype=like.dtype, device=like.device)
            self._masks = (
                beyond.repeat_interleave(spec.num_kv_heads, 0).unsqueeze(1),
                ahead.triu_(1).repeat(spec.num_heads // spec.num_kv_heads, 1),
            )
        return self._masks
