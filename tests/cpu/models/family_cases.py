"""Tiny checkpoints of the mixture-of-experts families, of awkward shapes, and their transformers models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from miles.arch import check_weights, load_spec
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.routing import Router
from miles.weights.hf import read_hf
from miles.weights.native_map import load_published


@dataclass(frozen=True)
class FamilyCase:
    """`config`: what makes the transformers model; `published`: keys that only published files have."""

    architecture: str
    config: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)


_SMALL = {"num_hidden_layers": 3, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 1}

_DEEPSEEK = (
    _SMALL
    | {"vocab_size": 47, "hidden_size": 26, "intermediate_size": 22, "moe_intermediate_size": 9}
    | {"num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 14, "kv_lora_rank": 11}
    | {"qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 5}
    | {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2}
    | {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_mtp_layers": 0}
    | {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "beta_fast": 4.0}
        | {"beta_slow": 1.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 0.9}
    }
)

CASES: dict[str, FamilyCase] = {
    "glm4_moe, groups, biases, head norms": FamilyCase(
        "Glm4Moe",
        _SMALL
        | {"vocab_size": 53, "hidden_size": 28, "intermediate_size": 26, "moe_intermediate_size": 10}
        | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "attention_bias": True}
        | {"use_qk_norm": True, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1}
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
        | {"n_shared_experts": 2, "routed_scaling_factor": 2.5, "num_mtp_layers": 0},
    ),
    "glm4_moe as Air: one group, no norms": FamilyCase(
        "Glm4Moe",
        _SMALL
        | {"vocab_size": 37, "hidden_size": 20, "intermediate_size": 14, "moe_intermediate_size": 7}
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": True}
        | {"first_k_dense_replace": 2, "n_routed_experts": 5, "num_experts_per_tok": 2}
        | {"norm_topk_prob": False, "num_mtp_layers": 0, "rms_norm_eps": 1e-3},
    ),
    "minimax_m2": FamilyCase(
        "MiniMaxM2",
        _SMALL
        | {"vocab_size": 43, "hidden_size": 22, "intermediate_size": 9, "num_local_experts": 6}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "rotary_dim": 6}
        | {"num_experts_per_tok": 2},
    ),
    "deepseek_v3, yarn": FamilyCase("DeepseekV3", _DEEPSEEK | {"first_k_dense_replace": 1}),
    "deepseek_v3, queries at once": FamilyCase(
        "DeepseekV3",
        _DEEPSEEK
        | {"q_lora_rank": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}
        | {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "vocab_size": 31},
    ),
    "deepseek_v32": FamilyCase(
        "DeepseekV32",
        _DEEPSEEK | {"first_k_dense_replace": 1, "index_topk": 6, "index_head_dim": 10, "index_n_heads": 13},
    ),
}


ONE_OF_EACH = {re.findall(r"\w+", name)[0]: case for name, case in CASES.items()}
"""By the name of the family."""
SHIPPING_MTP = {name: case for name, case in ONE_OF_EACH.items() if "num_mtp_layers" in case.config}


def make_reference(case: FamilyCase) -> nn.Module:
    """A transformers model with every number random, norms and biases too: a mix-up would show."""
    config = getattr(transformers, f"{case.architecture}Config")(**case.config)
    model_class = getattr(transformers, f"{case.architecture}ForCausalLM")
    # transformers' grouped kernel refuses odd expert widths; its plain loop takes all.
    model: nn.Module = model_class._from_config(config, experts_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator).add_(1.0 if "norm" in name else 0.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2, generator=generator)
    return model


def published_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a transformers model under published names: its experts are stacked, and MiniMax's have
    names of their own.
    """
    minimax = type(model).__name__.startswith("MiniMax")
    gate, up, down = ("w1", "w3", "w2") if minimax else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if minimax:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        prefix, _, stack = name.partition(".experts.")
        if not stack:
            found[name] = parameter.grad
            continue
        for expert, grad in enumerate(parameter.grad):
            parts = zip((gate, up), grad.chunk(2), strict=True) if stack == "gate_up_proj" else [(down, grad)]
            found |= {f"{prefix}.experts.{expert}.{part}.weight": value for part, value in parts}
    return found


def save_reference(case: FamilyCase, directory: Path) -> nn.Module:
    model = make_reference(case)
    model.save_pretrained(directory)  # type: ignore[operator]
    return model


def load_reference(directory: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")


def load_decoder(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The native decoder of a checkpoint whose weights are those that its config.json promises."""
    spec = load_spec(directory)
    check_weights(spec, directory)
    decoder = Decoder(spec, dtype)
    load_published(decoder, read_hf(directory))
    return decoder


def sequences(vocab_size: int, lengths: Sequence[int] = (7, 1, 23, 12)) -> list[Tensor]:
    return [torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def packed_logits(decoder: Decoder, tokens: Sequence[Tensor], router: Router | None = None) -> Tensor:
    """Logits [T, V] of packed sequences."""
    lengths = [len(sequence) for sequence in tokens]
    positions = torch.cat([torch.arange(n) for n in lengths])
    attention = PackedAttention(torch.tensor([0, *lengths]).cumsum(0))
    return decoder.logits(decoder(torch.cat(list(tokens)), positions, attention, router or Router.decide()))
