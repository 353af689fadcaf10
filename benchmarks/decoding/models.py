"""What is decoded, with random weights: the quickstart's, a dense one as wide, and larger ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from miles.arch import ArchSpec, MoeSpec, spec_from_hf_config
from miles.models.decoder import Decoder
from miles.weights.native_map import load_published

QUICKSTART: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 55,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "initializer_range": 0.05,
}
MOE_100M: dict[str, Any] = QUICKSTART | {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 448,
    "moe_intermediate_size": 448,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 16,
}
DENSE = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "quickstart": QUICKSTART,
    "dense": QUICKSTART | DENSE | {"intermediate_size": 128},
    "moe-100m": MOE_100M,
    "dense-30m": MOE_100M | DENSE | {"intermediate_size": 1344},
}


@dataclass(frozen=True)
class Subject:
    """One model on both sides, with the same weights."""

    name: str
    spec: ArchSpec
    decoder: Decoder
    hf: PreTrainedModel


def build(name: str) -> Subject:
    """The model `name` in fp32, weights from seed 0. Nothing ever stops: there is no end token."""
    torch.manual_seed(0)
    values = CONFIGS[name]
    config = AutoConfig.for_model(**values, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spec = spec_from_hf_config(values)
    decoder = Decoder(spec).requires_grad_(False)
    load_published(decoder, published(hf, spec))
    return Subject(name, spec, decoder, hf)


def published(hf: PreTrainedModel, spec: ArchSpec) -> list[tuple[str, torch.Tensor]]:
    """The weights as a checkpoint has them: transformers stacks experts in memory, files do not."""
    tensors = []
    for name, tensor in hf.state_dict().items():
        if name == "lm_head.weight" and spec.tie_word_embeddings:
            continue
        prefix, stacked, kind = name.partition(".experts.")
        if not stacked:
            tensors.append((name, tensor))
            continue
        for expert, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if kind == "gate_up_proj" else (matrix,)
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            tensors += [
                (f"{prefix}.experts.{expert}.{part}.weight", value)
                for part, value in zip(names, parts, strict=True)
            ]
    return tensors


def matrix_weights(spec: ArchSpec, experts_per_layer: float) -> float:
    """Weights in matrices that are read when so many experts of each MoE layer are; the head included, the
    embedding not."""
    total = float(spec.vocab_size * spec.hidden_size)
    for layer in spec.layers:
        attention, mlp = layer.attention, layer.mlp
        total += (attention.qkv_width + attention.query_width) * spec.hidden_size
        per_expert = 3 * spec.hidden_size * mlp.intermediate_size
        if isinstance(mlp, MoeSpec):
            total += mlp.num_experts * spec.hidden_size + experts_per_layer * per_expert
        else:
            total += per_expert
    return total
