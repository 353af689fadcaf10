"""The mixture-of-experts families against transformers: same weights, same logits, same gradients, same
files, decoded with a cache as read at once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_cases import CASES, FamilyCase, save_reference
from torch import Tensor

from miles.arch import check_weights, load_spec
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.routing import Router
from miles.weights.hf import read_hf
from miles.weights.native_map import load_published

LENGTHS = (7, 1, 23, 12)

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def load_decoder(directory: Path) -> Decoder:
    spec = load_spec(directory)
    check_weights(spec, directory)
    decoder = Decoder(spec)
    load_published(decoder, read_hf(directory))
    return decoder


def sequences(vocab_size: int) -> list[Tensor]:
    return [torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def packed(decoder: Decoder, tokens: list[Tensor], router: Router | None = None) -> Tensor:
    """Logits of packed sequences [T, V]."""
    lengths = [len(sequence) for sequence in tokens]
    positions = torch.cat([torch.arange(n) for n in lengths])
    attention = PackedAttention(torch.tensor([0, *lengths]).cumsum(0))
    return decoder.logits(decoder(torch.cat(tokens), positions, attention, router or Router.decide()))


@cases
def test_logits_equal_transformers(case: FamilyCase, tmp_path: Path) -> None:
    reference = save_reference(case, tmp_path)
    decoder = load_decoder(tmp_path)
    tokens = sequences(decoder.spec.vocab_size)
    with torch.no_grad():
        expected = torch.cat([reference(sequence[None]).logits[0] for sequence in tokens])
        logits = packed(decoder, tokens)
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() <= 1e-4
