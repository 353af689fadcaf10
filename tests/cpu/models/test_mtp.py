"""MTP layers: one computation, packed over whole sequences or step by step over a cache; no gradient to the
trunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles.arch import MtpSpec
from miles.models.attention import CachedAttention, PackedAttention
from miles.models.decoder import Decoder
from miles.models.invariance import find_exact_numerics
from miles.models.kv_cache import KVCache
from miles.models.mtp import MtpDraft
from miles.models.routing import Router
from miles.models.unrolled_attention import UnrolledAttention

TOLERANCE = 2e-5


@pytest.fixture
def make_draft() -> Callable[..., MtpDraft]:
    def make(decoder: Decoder, *layers: int, shared: bool = True) -> MtpDraft:
        """A draft whose layers are shaped like these layers of the trunk."""
        spec = replace(decoder.spec, mtp=MtpSpec(tuple(decoder.spec.layers[i] for i in layers), shared))
        draft = MtpDraft(spec)
        draft.init_weights(torch.Generator().manual_seed(3))
        return draft

    return make


def following(tokens: Tensor, cu_seqlens: Tensor, steps: int) -> Tensor:
    """Token t + steps of the same sequence at row t; 0 past its end."""
    parts = [tokens[a:b] for a, b in pairwise(cu_seqlens)]
    return torch.cat([F.pad(part[steps:], (0, min(steps, len(part)))) for part in parts])


def chain(draft, decoder, batch, hidden: Tensor, shifted: list[Tensor], rows=None) -> list[Tensor]:
    """The features of all depths, at all rows unless told otherwise."""
    rows = rows or [torch.arange(len(batch.tokens))] * len(shifted)
    attention = UnrolledAttention(PackedAttention(batch.cu_seqlens), batch.cu_seqlens)
    return draft.chain(hidden, shifted, rows, batch.positions, attention, decoder)


def test_a_row_reads_the_trunk_at_t_and_the_next_token(make_decoder, make_batch, make_draft) -> None:
    """Row t depends on hidden states up to t and tokens up to t + 1, on nothing later."""
    decoder, batch = make_decoder(), make_batch(9, 6)
    draft = make_draft(decoder, 0)
    hidden = batch.run(decoder, Router.decide()).detach()
    attention = PackedAttention(batch.cu_seqlens)

    def run(hidden: Tensor, tokens: Tensor) -> Tensor:
        return draft(hidden, following(tokens, batch.cu_seqlens, 1), batch.positions, attention, decoder)

    before = run(hidden, batch.tokens)
    changed = batch.tokens.clone()
    changed[5] = (changed[5] + 1) % 41
    after = run(hidden, changed)
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4], after[4])
    assert torch.equal(before[9:], after[9:])
    moved = hidden.clone()
    moved[5] += 1
    assert torch.equal(run(moved, batch.tokens)[:5], before[:5])
    assert not torch.equal(run(moved, batch.tokens)[5], before[5])


@pytest.mark.parametrize("layer", [0, 1], ids=["moe", "dense"])
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@torch.inference_mode()
def test_stepping_over_a_cache_equals_a_packed_pass(
    layer, exact, make_decoder, make_batch, make_draft
) -> None:
    decoder, batch = make_decoder(head_dim=16), make_batch(7, 12)
    draft = make_draft(decoder, layer)
    if exact:
        numerics = find_exact_numerics(decoder.spec, torch.float32)
        decoder.use_numerics(numerics)
        draft.use_numerics(numerics)
    numerics = draft.numerics
    attention = numerics.packed_attention(batch.cu_seqlens)
    hidden = decoder(batch.tokens, batch.positions, attention, Router.decide())
    tokens = following(batch.tokens, batch.cu_seqlens, 1)
    packed = draft(hidden, tokens, batch.positions, attention, decoder)

    read = 4  # rows of each sequence that a prefill reads
    rows = [batch.rows(0), batch.rows(1)]
    prompt = torch.cat([torch.arange(r.start, r.start + read) for r in rows])
    cache = KVCache(draft.arch, 3, numerics.cache_length(16))
    prefill = numerics.packed_attention(torch.tensor([0, read, 2 * read]), cache, torch.tensor([0, 1]))
    first = draft(hidden[prompt], tokens[prompt], batch.positions[prompt], prefill, decoder)
    gaps = [(first - packed[prompt]).abs().max()]
    for step in range(read, 7):
        at = torch.tensor([rows[0].start + step, rows[1].start + step])
        cached = numerics.cached_attention(cache, torch.full((2,), step))
        out = draft(hidden[at], tokens[at], batch.positions[at], cached, decoder)
        gaps.append((out - packed[at]).abs().max())
    assert max(gaps) <= (0 if exact else TOLERANCE)


@torch.inference_mode()
def test_guesses_are_overwritten_by_the_rows_that_the_trunk_read(
    make_decoder, make_batch, make_draft
) -> None:
    """After a guess two deep, the true rows give what a packed pass gives: nothing of the guess is left."""
    decoder, batch = make_decoder(), make_batch(10)
    draft = make_draft(decoder, 0)
    hidden = batch.run(decoder, Router.decide())
    tokens = following(batch.tokens, batch.cu_seqlens, 1)
    packed = draft(hidden, tokens, batch.positions, PackedAttention(batch.cu_seqlens), decoder)
    cache = KVCache(draft.arch, 1, 16)

    def step(state: Tensor, row: int, token: Tensor, depth: int = 0) -> Tensor:
        position = draft.position_of(torch.tensor([row]), depth)
        return draft(state, token, position, CachedAttention(cache, position), decoder, depth)

    for row in range(8):
        features = step(hidden[row : row + 1], row, tokens[row : row + 1])
        for depth in (1, 2):
            guess = draft.logits(features, decoder).argmax(-1)
            features = step(features, row, guess, depth)
    out = step(hidden[8:9], 8, tokens[8:9])
    assert (out - packed[8:9]).abs().max() < TOLERANCE


@pytest.mark.parametrize("shared", [True, False])
def test_the_second_layer_reads_the_first_one_a_token_later(
    shared, make_decoder, make_batch, make_draft
) -> None:
    """Depth 1 at row t sees tokens up to t + 2; its gradient reaches both layers and nothing of the trunk."""
    decoder, batch = make_decoder(), make_batch(9)
    draft = make_draft(decoder, 0, 1, shared=shared)
    assert len(draft.projections) == (1 if shared else 2)
    hidden = batch.run(decoder, Router.decide())

    def run(tokens: Tensor) -> list[Tensor]:
        shifted = [following(tokens, batch.cu_seqlens, 1 + depth) for depth in range(2)]
        return chain(draft, decoder, batch, hidden, shifted)

    first, second = run(batch.tokens)
    changed = batch.tokens.clone()
    changed[6] = (changed[6] + 1) % 41
    other_first, other_second = run(changed)
    assert (first[:5] - other_first[:5]).abs().max() < TOLERANCE
    assert (second[:4] - other_second[:4]).abs().max() < TOLERANCE
    assert (second[4] - other_second[4]).abs().max() > 100 * TOLERANCE
    draft.logits(second[:-3], decoder).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in draft.parameters())
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_the_count_of_parameters_is_that_of_the_module(make_decoder, make_draft) -> None:
    for shared in (True, False):
        draft = make_draft(make_decoder(), 0, 1, shared=shared)
        counted = draft.spec.mtp.num_parameters(draft.spec.hidden_size)
        assert counted == sum(parameter.numel() for parameter in draft.parameters())


@torch.no_grad()
@pytest.mark.parametrize("layers", [(0,), (0, 1)], ids=["one layer", "two layers"])
@pytest.mark.parametrize("long", [False, True])
def test_a_chain_over_whole_sequences_equals_guessing_on_from_every_row(
    layers, long, make_decoder, make_batch, make_draft
) -> None:
    """Four depths: what training computes at once is what the engine computes row by row over its cache."""
    decoder, batch = make_decoder(), make_batch(140 if long else 9, 6)
    draft = make_draft(decoder, *layers)
    hidden = batch.run(decoder, Router.decide())
    shifted = [following(batch.tokens, batch.cu_seqlens, 1 + depth) for depth in range(4)]
    # What goes on at each depth thins out, and not evenly: every other row of the first sequence drops out.
    rows = [torch.arange(len(batch.tokens))]
    for depth in range(1, 4):
        rows.append(rows[-1][(rows[-1] % (depth + 1) > 0) | (rows[-1] >= batch.rows(1).start)])
    chains = chain(draft, decoder, batch, hidden, shifted, rows)
    compared = 0
    for sequence in range(2):
        span = batch.rows(sequence)
        length = span.stop - span.start
        for row in [0, 3, 5, length - 6] if length > 9 else range(length - 4):
            expected = _guess_on(draft, decoder, hidden[span], [s[span] for s in shifted], row)
            for depth in range(4):
                (place,) = (rows[depth] == span.start + row).nonzero(as_tuple=True)
                for got in chains[depth][place]:
                    compared += 1
                    assert (got - expected[depth]).abs().max() < TOLERANCE, (sequence, row, depth)
    assert compared > 12


def _guess_on(
    draft: MtpDraft, decoder: Decoder, hidden: Tensor, shifted: list[Tensor], row: int
) -> list[Tensor]:
    """The features of each depth at one row: true rows of every layer up to it, then guesses."""
    cache = KVCache(draft.arch, 1, len(hidden) + 4)
    seen = PackedAttention(torch.tensor([0, row + 1]), cache, torch.tensor([0]))
    state, out = hidden[: row + 1], []
    for depth, tokens in enumerate(shifted):
        if depth < draft.num_layers:
            state = draft(state, tokens[: row + 1], torch.arange(row + 1), seen, decoder, depth)
            out.append(state[row])
            continue
        position = draft.position_of(torch.tensor([row]), depth)
        cached = CachedAttention(cache, position)
        state = draft(out[-1][None], tokens[row : row + 1], position, cached, decoder, depth)
        out.append(state[0])
    return out


def test_a_long_chain_has_the_gradients_of_its_parts(make_decoder, make_batch, make_draft) -> None:
    """Blocks that are computed again in backward change nothing but memory."""
    decoder, batch = make_decoder(), make_batch(150)
    hidden = batch.run(decoder, Router.decide()).detach()
    shifted = [following(batch.tokens, batch.cu_seqlens, 1 + depth) for depth in range(3)]

    def gradients(block: int) -> list[Tensor]:
        draft = make_draft(decoder, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("miles.models.unrolled_attention.QUERY_BLOCK", block)
            out = chain(draft, decoder, batch, hidden, shifted)
            sum(features.square().sum() for features in out).backward()
        return [parameter.grad for parameter in draft.parameters()]

    for small, whole in zip(gradients(64), gradients(1000), strict=True):
        torch.testing.assert_close(small, whole, atol=1e-3, rtol=1e-4)
