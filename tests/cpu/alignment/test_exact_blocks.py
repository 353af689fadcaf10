"""Exact kernels compute the same function as the fast ones, gradients included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alignment_support import SPECS

from miles.arch.spec import ArchSpec
from miles.models.decoder import Decoder
from miles.models.exact_sums import padded_keys
from miles.models.logprob import token_log_probs
from miles.models.numerics import FAST, Numerics
from miles.models.routing import Router

LENGTHS = {"short": (5, 1, 40, 17), "long and short": (300, 7, 140), "beside a block": (128, 129, 127)}


def gradients(decoder: Decoder, numerics: Numerics, lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    decoder.use_numerics(numerics)
    decoder.zero_grad()
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (
        torch.randint(decoder.spec.vocab_size, (sum(lengths),), generator=generator) for _ in range(2)
    )
    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = numerics.packed_attention(torch.tensor([0, *lengths]).cumsum(0))
    hidden = decoder(tokens, positions, attention, Router.decide())
    cap = decoder.spec.logit_softcap
    log_probs, _ = token_log_probs(hidden, decoder.head_weight, targets, linear=numerics.linear, softcap=cap)
    (log_probs * torch.randn(len(log_probs), generator=generator)).sum().backward()
    return {"log probs": log_probs.detach()} | {
        name: parameter.grad.clone()
        for name, parameter in decoder.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_are_those_of_the_fast_kernels(name: str, lengths, exact) -> None:
    spec = _decisive(SPECS[name])
    decoder = Decoder(spec)
    decoder.init_weights(torch.Generator().manual_seed(1))
    fast = gradients(decoder, FAST, lengths)
    slow = gradients(decoder, exact(spec, torch.float32), lengths)
    for parameter, expected in fast.items():
        scale = expected.abs().max() + 1e-6
        assert (slow[parameter] - expected).abs().max() < 2e-3 * scale, parameter


def _decisive(spec: ArchSpec) -> ArchSpec:
    """With so many heads in an indexer that no two keys score alike: of such, kernels may choose others."""
    attention = spec.layers[0].attention
    if attention.indexer is None:
        return spec
    attention = replace(attention, indexer=replace(attention.indexer, num_heads=24))
    return replace(spec, layers=tuple(replace(layer, attention=attention) for layer in spec.layers))


def test_activation_recompute_gives_the_same_bits(exact) -> None:
    spec = SPECS["odd widths"]
    decoder = Decoder(spec)
    decoder.init_weights(torch.Generator().manual_seed(1))
    kept = gradients(decoder, exact(spec, torch.float32), (30, 200))
    decoder.recompute_num_layers = spec.num_layers
    again = gradients(decoder, exact(spec, torch.float32), (30, 200))
    for name, expected in kept.items():
        assert torch.equal(again[name], expected), name


@pytest.mark.parametrize(
    ("count", "width"), [(1, 16), (16, 16), (17, 32), (128, 128), (129, 144), (300, 304)]
)
def test_keys_are_padded_to_steps(count: int, width: int) -> None:
    assert padded_keys(count) == width
