"""A tiny MoE with a dense layer, biases and an untied head: every kind of published tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miles.arch import spec_from_hf_config
from miles.models.decoder import Decoder

sys.path.insert(0, str(Path(__file__).parent))

TINY = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 19,
    "hidden_size": 10,
    "intermediate_size": 14,
    "moe_intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "attention_bias": True,
    "rope_theta": 1e4,
    "max_position_embeddings": 32,
    "eos_token_id": 2,
}


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    """Decoders whose every element is a different number."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Decoder:
        decoder = Decoder(spec_from_hf_config(TINY | changes), dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.normal_(generator=generator)
        return decoder

    return make
