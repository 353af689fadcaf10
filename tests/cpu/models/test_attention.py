"""Packing, caching and layout never change what a token computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from miles.models.attention import EXPLICIT_MAX_LEN, CachedAttention, PackedAttention
from miles.models.decoder import Decoder
from miles.models.kv_cache import KVCache
from miles.models.routing import Router

TOLERANCE = 2e-5

LENGTH_MIXES = {
    "uneven": (5, 1, 17, 9),
    "equal": (8, 8, 8),
    "one": (12,),
    "one long": (EXPLICIT_MAX_LEN + 30,),
    "long and short": (EXPLICIT_MAX_LEN + 5, 3),
}


@pytest.mark.parametrize("lengths", LENGTH_MIXES.values(), ids=LENGTH_MIXES.keys())
def test_packed_sequences_equal_each_sequence_alone(
    lengths: tuple[int, ...], make_decoder: Callable, make_batch: Callable
) -> None:
    decoder, batch = make_decoder(), make_batch(*lengths)
    packed = decoder.logits(batch.run(decoder, Router.decide()))
    weighting = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    (packed * weighting).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    for sequence, length in enumerate(lengths):
        rows = batch.rows(sequence)
        attention = PackedAttention(torch.tensor([0, length]))
        hidden = decoder(batch.tokens[rows], torch.arange(length), attention, Router.decide())
        alone = decoder.logits(hidden)
        assert (alone - packed[rows]).abs().max() < TOLERANCE
        (alone * weighting[rows]).sum().backward()
    for name, parameter in decoder.named_parameters():
        scale = parameter.grad.abs().max()
        assert (gradients[name] - parameter.grad).abs().max() < 1e-4 * scale, name


def test_a_later_token_never_reaches_an_earlier_one(make_decoder: Callable, make_batch: Callable) -> None:
    decoder, batch = make_decoder(), make_batch(9, 6)
    before = batch.run(decoder, Router.decide())
    batch.tokens[8] = (batch.tokens[8] + 1) % 41
    after = batch.run(decoder, Router.decide())
    assert torch.equal(before[:8], after[:8])
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[8], after[8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_cached_decode_equals_a_packed_forward(
    dtype: torch.dtype, make_decoder: Callable, make_batch: Callable
) -> None:
    decoder: Decoder = make_decoder().to(dtype)
    lengths, prompts = (20, 9, 34), (4, 7, 15)
    batch = make_batch(*lengths)
    router = Router.record()
    expected = batch.run(decoder, router)
    routes = router.recorded()

    cache = KVCache(decoder.spec, num_slots=4, max_len=40, dtype=dtype)
    starts = batch.cu_seqlens[:-1]
    prompt_rows = torch.cat([torch.arange(p) + start for p, start in zip(prompts, starts, strict=True)])
    slots = torch.tensor([0, 1, 2])
    prefill = PackedAttention(torch.tensor([0, *prompts]).cumsum(0), cache, slots)
    hidden = decoder(
        batch.tokens[prompt_rows], batch.positions[prompt_rows], prefill, Router.replay(routes[prompt_rows])
    )
    tolerance = TOLERANCE if dtype == torch.float32 else 0.1
    assert (hidden - expected[prompt_rows]).abs().max() < tolerance

    filled = torch.tensor(prompts)
    for _ in range(2):
        rows = starts + filled
        hidden = decoder(
            batch.tokens[rows], filled, CachedAttention(cache, filled), Router.replay(routes[rows])
        )
        assert (hidden - expected[rows]).abs().max() < tolerance
        filled = filled + 1


@torch.inference_mode()
def test_a_shared_prompt_and_a_compacted_slot_decode_like_their_own(
    make_decoder: Callable, make_batch: Callable
) -> None:
    decoder, batch = make_decoder(), make_batch(11)
    cache = KVCache(decoder.spec, num_slots=6, max_len=16)
    PROMPT = 10
    decoder(
        batch.tokens[:PROMPT],
        batch.positions[:PROMPT],
        PackedAttention(torch.tensor([0, PROMPT]), cache, torch.tensor([3])),
        Router.decide(),
    )
    cache.copy_slot(3, [1, 2], PROMPT)
    cache.copy_slot(3, [5], PROMPT)
    cache.move_slots([5], [0], PROMPT)
    expected = batch.run(decoder, Router.decide())[PROMPT]
    filled = torch.full((4,), PROMPT)
    hidden = decoder(batch.tokens[-1].repeat(4), filled, CachedAttention(cache, filled), Router.decide())
    assert (hidden - expected).abs().max() < TOLERANCE


def test_a_cache_reports_its_size(make_decoder: Callable) -> None:
    spec = make_decoder().spec
    cache = KVCache(spec, num_slots=3, max_len=16, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * spec.num_layers * 3 * 2 * 16 * 6 * 2
