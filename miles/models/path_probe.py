"""Compares the two paths of a token, decoded or packed: in attention, its products one by one, and a decoder.

Shapes: H query heads, Hkv key/value heads, G = H / Hkv, d head width, B batch, M query rows, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from miles.arch.spec import ArchSpec, AttentionSpec
from miles.models.decoder import Decoder
from miles.models.exact_attention import QUERY_BLOCK
from miles.models.exact_sums import KEY_BLOCK, KEY_STEP, QUERY_STEP, padded_keys
from miles.models.invariant import bmm
from miles.models.kv_cache import KVCache
from miles.models.numerics import ExactNumerics
from miles.models.routing import Router

BATCHES = (1, 2, 7)
BLOCKS = (*range(KEY_STEP, KEY_BLOCK + 1, KEY_STEP),)
WIDTHS = (*BLOCKS, 144, 208, 304, 512, 720, 1024, 2064, 4096)
"""Keys of a product; of those beyond one block, a sample."""
LENGTHS = (300, 130, 33, 3)
"""Of sequences whose every position is decoded."""
DECODED, PROMPTS = 6, (150, 40, 11, 1)
"""Steps with a whole decoder, and the prompts before them."""


@dataclass(frozen=True)
class AttentionProbe:
    """Attention in fp32, as exact numerics compute it for any dtype."""

    model: ArchSpec
    spec: AttentionSpec
    """Of the layers that are tried."""
    generator: torch.Generator
    device: torch.device

    def products_agree(self, min_queries: int) -> bool:
        """Whether scores and weighted values of a query have the same bits among other numbers of queries,
        keys and sequences."""
        groups, d = self.spec.num_heads // self.spec.num_kv_heads, self.spec.head_dim
        widths = [width for width in WIDTHS if width <= padded_keys(self.model.max_position_embeddings)]
        q = self._random(max(BATCHES), groups * QUERY_BLOCK, d)
        k = self._random(max(BATCHES), widths[-1], d)
        v = self._random(max(BATCHES), KEY_BLOCK, d)
        v[:, 1::2] = -v[:, ::2]
        p = 1 + 0.01 * self._random(max(BATCHES), groups * QUERY_BLOCK, KEY_BLOCK)
        scores = bmm(q, k.transpose(1, 2))
        steps = (1, 2, 3, groups, 3 * groups, groups * QUERY_BLOCK // QUERY_STEP)
        rows = dict.fromkeys((min_queries, *(step * QUERY_STEP for step in steps)))
        for batch, start, count in product(BATCHES, (0, 1), rows):
            if start + count > q.shape[1]:
                continue
            taken = slice(start, start + count)
            for width in widths:
                own = bmm(q[:batch, taken].contiguous(), k[:batch, :width].transpose(1, 2))
                if not torch.equal(own, scores[:batch, taken, :width]):
                    return False
            for width in BLOCKS:
                seen = torch.arange(KEY_BLOCK, device=self.device) < width
                own = bmm(p[:batch, taken, :width].contiguous(), v[:batch, :width])
                if not torch.equal(own, bmm(p * seen, v)[:batch, taken]):
                    return False
        return True

    def paths_agree(self, numerics: ExactNumerics) -> bool:
        """Sequences of awkward lengths, each decoded beside others at other positions."""
        lengths = [min(length, self.model.max_position_embeddings) for length in LENGTHS]
        total, longest = sum(lengths), max(lengths)
        q = self._random(total, self.spec.num_heads, self.spec.head_dim)
        k, v = (self._random(total, self.spec.num_kv_heads, self.spec.head_dim) for _ in range(2))
        # Nearly equal weights of values that alternate in sign: their sum is small beside its terms.
        q, v[1::2] = q * 0.05, -v[: total - 1 : 2]
        if self.spec.latent is not None:
            k = v
        starts = torch.tensor([0, *lengths], device=self.device).cumsum(0)
        packed = numerics.packed_attention(starts).attend(0, q, k, v, self.spec)
        one_layer = replace(self.model, layers=(replace(self.model.layers[0], attention=self.spec),))
        cache = KVCache(one_layer, len(lengths), numerics.cache_length(longest), device=self.device)
        for position in range(longest):
            filled = torch.tensor([position % length for length in lengths], device=self.device)
            rows = starts[:-1] + filled
            step = numerics.cached_attention(cache, filled)
            if not torch.equal(step.attend(0, q[rows], k[rows], v[rows], self.spec), packed[rows]):
                return False
        return True

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


def decoding_agrees(decoder: Decoder, numerics: ExactNumerics, generator: torch.Generator) -> bool:
    """Whether the last tokens of some sequences get the hidden states, read one by one after a prefill, that
    they get when all sequences are packed."""
    device, most = decoder.embed.device, decoder.spec.max_position_embeddings
    prompts = [min(prompt, most - DECODED) for prompt in PROMPTS]
    lengths = torch.tensor([prompt + DECODED for prompt in prompts], device=device)
    total = int(lengths.sum())
    tokens = torch.randint(decoder.spec.vocab_size, (total,), generator=generator, device=device)
    ends = lengths.cumsum(0)
    packed = _read(decoder, numerics, tokens.split(lengths.tolist()))
    cache = KVCache(
        decoder.spec, len(prompts), numerics.cache_length(max(lengths.tolist())), decoder.embed.dtype, device
    )
    for slot, sequence in enumerate(tokens.split(lengths.tolist())):
        _read(decoder, numerics, [sequence[:-DECODED]], cache, slot)
    for left in range(DECODED, 0, -1):
        rows, positions = ends - left, lengths - left
        attention = numerics.cached_attention(cache, positions)
        if not torch.equal(decoder(tokens[rows], positions, attention, Router.decide()), packed[rows]):
            return False
    return True


def _read(
    decoder: Decoder,
    numerics: ExactNumerics,
    sequences: Sequence[Tensor],
    cache: KVCache | None = None,
    slot: int = 0,
) -> Tensor:
    """Hidden states of packed sequences; with a cache, of one that is kept in a slot."""
    device = decoder.embed.device
    positions = torch.cat([torch.arange(len(sequence), device=device) for sequence in sequences])
    starts = torch.tensor([0, *(len(sequence) for sequence in sequences)], device=device).cumsum(0)
    slots = None if cache is None else torch.tensor([slot], device=device)
    attention = numerics.packed_attention(starts, cache, slots)
    return decoder(torch.cat(list(sequences)), positions, attention, Router.decide())
