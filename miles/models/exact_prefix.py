"""`PrefixAttention` with the bits of exact attention: a prompt passes the model once, and every continuation
attends to prompt and itself in the places that the whole sequence would have.

Shapes: N continuations, C longest continuation, S padded keys of the longest sequence, H query heads, Hkv
key/value heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.exact_attention import ExactPackedAttention
from miles.models.exact_sums import QUERY_STEP, padded_keys, weighted_values
from miles.models.token_grid import TokenGrid


class ExactPrefixAttention:
    """Arguments as in `PrefixAttention`; scores are materialised, so sequences should be short."""

    def __init__(self, prompt_cu_seqlens: Tensor, own_cu_seqlens: Tensor, prompt_of_own: Tensor) -> None:
        self._num_prompt_tokens = int(prompt_cu_seqlens[-1])
        self._prompts = ExactPackedAttention(prompt_cu_seqlens)
        self._own = TokenGrid(own_cu_seqlens)
        starts = prompt_cu_seqlens[:-1].long()[prompt_of_own].unsqueeze(1)
        prompts = prompt_cu_seqlens.diff().long()[prompt_of_own].unsqueeze(1)
        lengths = self._own.lengths.unsqueeze(1)
        longest = int(self._own.lengths.max())
        self._num_queries = -(-longest // QUERY_STEP) * QUERY_STEP
        steps = torch.arange(padded_keys(int((prompts + lengths).max())), device=starts.device)
        own_starts = self._num_prompt_tokens + own_cu_seqlens[:-1].long().unsqueeze(1)
        tokens = torch.where(steps < prompts, starts + steps, own_starts + steps - prompts)
        # Past the end of a sequence stand keys that nobody sees; they only have to be finite.
        self._key_tokens = torch.where(steps < prompts + lengths, tokens, 0).flatten()
        queries = prompts + torch.arange(self._num_queries, device=starts.device)
        beyond = steps > queries.unsqueeze(2)
        self._mask = torch.zeros(beyond.shape, device=starts.device).masked_fill_(beyond, float("-inf"))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        split, n = self._num_prompt_tokens, self._own.num_sequences
        of_prompts = self._prompts.attend(layer, q[:split], k[:split], v[:split], spec)
        queries = self._own.lay_out(q[split:].float() * spec.head_dim**-0.5, self._num_queries)
        keys, values = (self._keys(x) for x in (k, v))
        scores = torch.bmm(queries.view(len(keys), -1, spec.head_dim), keys.transpose(1, 2))
        by_head = scores.view(n, spec.num_heads, self._num_queries, -1)
        by_head.add_(self._mask.unsqueeze(1))
        out = weighted_values(torch.softmax(scores, -1), values)
        of_own = self._own.flatten(out.view(n, spec.num_heads, self._num_queries, -1))
        return torch.cat([of_prompts, of_own.to(q.dtype)])

    def _keys(self, x: Tensor) -> Tensor:
        """[T, Hkv, d] -> [N * Hkv, S, d]."""
        grid = x.float().index_select(0, self._key_tokens)
        grid = grid.view(self._own.num_sequences, -1, *x.shape[1:])
        return grid.transpose(1, 2).flatten(0, 1)
