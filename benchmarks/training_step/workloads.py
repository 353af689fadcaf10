"""What is trained: three models made on the spot, and batches of random tokens in shapes that GRPO meets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_QWEN3 = {
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "eos_token_id": 1,
    "bos_token_id": None,
}

MODELS: dict[str, dict[str, Any]] = {
    "quickstart": _QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 55,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "initializer_range": 0.05,
    },
    "moe": _QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "initializer_range": 0.02,
    },
    "dense": _QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 4096,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1024,
        "initializer_range": 0.02,
    },
}
"""config.json by name: the quickstart's model, a MoE of 21M parameters, a dense one of 11M."""


@dataclass(frozen=True)
class Shape:
    """Groups of 8 samples. Lengths are drawn between bounds, those of responses evenly in the logarithm."""

    groups: int
    prompt: tuple[int, int]
    response: tuple[int, int]


GROUP_SIZE = 8

WORKLOADS: dict[str, dict[str, Shape]] = {
    "short-prompts": {
        "quickstart": Shape(32, (8, 14), (5, 12)),
        "moe": Shape(5, (24, 40), (16, 64)),
        "dense": Shape(5, (24, 40), (16, 64)),
    },
    "long-prompts": {
        "quickstart": Shape(16, (160, 256), (8, 32)),
        "moe": Shape(2, (192, 256), (16, 64)),
        "dense": Shape(2, (192, 256), (16, 64)),
    },
    "uneven-responses": {
        "quickstart": Shape(4, (8, 14), (32, 1024)),
        "moe": Shape(2, (24, 40), (32, 1024)),
        "dense": Shape(2, (24, 40), (32, 1024)),
    },
}
"""Workload -> model -> shape."""

TOKEN_BUDGET = 4096
"""Rows of one micro-batch, on both sides."""


def make_batch(shape: Shape, vocab_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """One step's samples as flat arrays: tokens of all samples [sum n], lengths n and prompt lengths [N],
    groups [N], and an advantage [N] that is never 0, so that neither side leaves a sample out.
    """
    rng = np.random.default_rng(seed)
    count = shape.groups * GROUP_SIZE
    prompts = [rng.integers(2, vocab_size, rng.integers(*shape.prompt)) for _ in range(shape.groups)]
    low, high = np.log(shape.response[0]), np.log(shape.response[1])
    responses = [rng.integers(2, vocab_size, int(np.exp(rng.uniform(low, high)))) for _ in range(count)]
    texts = [np.concatenate([prompts[i // GROUP_SIZE], response]) for i, response in enumerate(responses)]
    return {
        "tokens": np.concatenate(texts),
        "lengths": np.array([len(text) for text in texts]),
        "prompt_lengths": np.array([len(prompts[i // GROUP_SIZE]) for i in range(count)]),
        "groups": np.arange(count) // GROUP_SIZE,
        "advantages": (rng.choice([-1.0, 1.0], count) * rng.uniform(0.2, 1.5, count)).astype(np.float32),
    }


def rows_of(batch: dict[str, np.ndarray]) -> int:
    """Token positions that a step trains through: every token of every sample but its last one."""
    return int((batch["lengths"] - 1).sum())
