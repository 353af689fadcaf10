"""Tiny models of awkward shapes, and packed token batches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles.arch import spec_from_hf_config
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.routing import Router

sys.path.insert(0, str(Path(__file__).parent))

TINY_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
}


@dataclass(frozen=True)
class Batch:
    """Packed sequences: tokens, positions int64 [T], cu_seqlens [N + 1]."""

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    def run(self, decoder: Decoder, router: Router) -> Tensor:
        return decoder(self.tokens, self.positions, PackedAttention(self.cu_seqlens), router)

    def rows(self, sequence: int) -> slice:
        return slice(int(self.cu_seqlens[sequence]), int(self.cu_seqlens[sequence + 1]))


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    def make(*lengths: int, vocab: int = 41, seed: int = 0) -> Batch:
        tokens = torch.randint(vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
        positions = torch.cat([torch.arange(length) for length in lengths])
        return Batch(tokens, positions, torch.tensor([0, *lengths]).cumsum(0))

    return make


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    def make(seed: int = 0, **changes: object) -> Decoder:
        decoder = Decoder(spec_from_hf_config(TINY_MOE | changes))
        decoder.init_weights(torch.Generator().manual_seed(seed))
        return decoder

    return make
