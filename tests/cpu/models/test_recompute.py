"""Recomputed parts keep less for backward and give the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.recompute import RecomputedModule
from miles.models.routing import Router

TOKENS = 96


def kept_and_gradients(
    decoder: Decoder, modules: set[RecomputedModule], recompute_num_layers: int = 0
) -> tuple[int, dict[str, Tensor]]:
    """Bytes of distinct storages that forward keeps for backward, weights aside, and all gradients."""
    decoder.recompute(frozenset(modules))
    decoder.recompute_num_layers = recompute_num_layers
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = torch.arange(TOKENS) % decoder.spec.vocab_size
    attention = PackedAttention(torch.tensor([0, TOKENS]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = decoder(tokens, torch.arange(TOKENS), attention, Router())
    decoder.zero_grad()
    out.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in decoder.named_parameters() if p.grad is not None}
    return sum(kept.values()), gradients


@pytest.mark.parametrize(
    "modules",
    [{"core_attn"}, {"mlp"}, {"moe"}, {"core_attn", "mlp", "moe"}],
    ids=lambda modules: "+".join(sorted(modules)),
)
def test_parts_of_a_layer(make_decoder: Callable[..., Decoder], modules: set[RecomputedModule]) -> None:
    decoder = make_decoder()
    everything, expected = kept_and_gradients(decoder, set())
    less, got = kept_and_gradients(decoder, modules)
    assert less < 0.97 * everything
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            got[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_whole_layers_keep_least(make_decoder: Callable[..., Decoder]) -> None:
    decoder = make_decoder()
    parts, _ = kept_and_gradients(decoder, {"core_attn", "mlp", "moe"})
    whole, _ = kept_and_gradients(decoder, set(), recompute_num_layers=decoder.spec.num_layers)
    assert whole < parts
