"""The decoder at work for the engine: prefill of packed prompts or of a chunk of one, decode of one token per
slot, over one KV cache.

Shapes: P prompts, n running requests in slots 0..n-1, V vocabulary, Lm MoE layers, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from miles.arch.spec import ArchSpec
from miles.models.attention import Attention
from miles.models.decoder import Decoder, Taps
from miles.models.eagle import DraftModel
from miles.models.first_rows import FirstRows
from miles.models.kv_cache import KVCache
from miles.models.numerics import Numerics
from miles.models.routing import Router
from miles.models.row_blocks import filled_up
from miles.models.tree_attention import TreeNodes
from miles.rollout.native.captured import CapturedDecode


@dataclass(frozen=True, slots=True)
class PromptEnd:
    """What reading a prompt leaves beside the cache: logits of the next token, fp32 or the decoder's dtype,
    the routes of its tokens, int16 [length, Lm, k] (None for a dense model), and what a draft reads of them
    (`States.read`)."""

    logits_1V: torch.Tensor
    routes: torch.Tensor | None
    hidden: torch.Tensor


@dataclass(frozen=True, slots=True)
class States:
    """Of T tokens: final hidden states [T, D], routes int16 [T, Lm, k] (None for a dense model), and what the
    draft reads [T, D']: the inputs of the layers that it taps, or the final hidden states."""

    hidden: torch.Tensor
    routes: torch.Tensor | None
    read: torch.Tensor


class Runner:
    """A decoder and the keys and values of what it has read. `decoder`, and `draft` where the model's own
    layers guess ahead, may be replaced between two calls."""

    def __init__(
        self,
        spec: ArchSpec,
        num_slots: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        numerics: Numerics,
        spare_columns: int = 0,
        captured_requests: int = 0,
    ) -> None:
        """`spare_columns`: guesses of what follows may reach so far beyond the context length.
        `captured_requests`: decode steps of up to so many are captured, on CUDA; the last slot never decodes.
        """
        self.spec, self.device, self.numerics = spec, device, numerics
        columns = numerics.cache_length(context_length + spare_columns)
        self.cache = KVCache(spec, num_slots, columns, dtype, device)
        self.captured = CapturedDecode(spec, self.cache, captured_requests) if captured_requests else None
        self._decoder: Decoder | None = None
        self.draft: DraftModel | None = None

    @property
    def decoder(self) -> Decoder | None:
        """What it serves; to be set again whenever its weights changed."""
        return self._decoder

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        self._decoder = decoder
        if self.captured is not None:
            self.captured.serve(decoder)

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> list[PromptEnd]:
        """Read each prompt into its slot."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.tensor(list(chain.from_iterable(prompts)), device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], device=self.device)
        attention = self.numerics.packed_attention(
            cu_seqlens, self.cache, torch.tensor(slots, device=self.device)
        )
        states = self._forward(tokens, positions, attention)
        logits = self.logits(states.hidden[cu_seqlens[1:] - 1])
        split_routes = [None] * len(prompts) if states.routes is None else states.routes.split(lengths)
        ends = zip(logits.split(1), split_routes, states.read.split(lengths), strict=True)
        return [PromptEnd(*end) for end in ends]

    def prefill_chunk(self, tokens: Sequence[int], slot: int, start: int) -> PromptEnd:
        """Read the next tokens of a prompt that has `start` tokens in the slot; routes and states are
        theirs."""
        ids = torch.tensor(tokens, device=self.device)
        positions = torch.arange(start, start + len(tokens), device=self.device)
        attention = self.numerics.chunk_attention(self.cache, slot, start, len(tokens))
        states = self._forward(ids, positions, attention)
        return PromptEnd(self.logits(states.hidden[-1:]), states.routes, states.read)

    def decode(
        self, tokens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Read one token per slot, int64 [n], at `positions` [n], the number of positions already cached.

        Returns the logits after it [n, V] and its routes, int16 [n, Lm, k] (None for a dense model), both
        until the next step.
        """
        if self.captured is not None and (step := self.captured.decode(tokens, positions)) is not None:
            return step
        count, attention = len(tokens), self.numerics.cached_attention(self.cache, positions)
        rows = self.numerics.step_rows(count)
        if rows == count:
            states = self._forward(tokens, positions, attention)
            return self.logits(states.hidden), states.routes
        filled = FirstRows(attention, count)
        states = self._forward(filled_up(tokens, rows), filled_up(positions, rows), filled)
        routes = None if states.routes is None else states.routes[:count]
        return self.logits(states.hidden)[:count], routes

    def read_nodes(self, tokens: torch.Tensor, nodes: TreeNodes) -> States:
        """Read the last token of each slot and guesses behind it, int64 [T]."""
        return self._forward(tokens, nodes.positions, self.numerics.tree_attention(self.cache, nodes))

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention: Attention) -> States:
        assert self.decoder is not None, "the engine has weights before it has requests"
        router = Router.record()
        taps = Taps(self.draft.taps) if self.draft is not None and self.draft.taps else None
        hidden = self.decoder(tokens, positions, attention, router, taps)
        routes = router.recorded() if self.spec.is_moe else None
        return States(hidden, routes, hidden if taps is None else taps.joined())

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, V]."""
        assert self.decoder is not None
        return self.decoder.logits(hidden)
