"""Tiny checkpoints of the mixture-of-experts families, of awkward shapes, and their transformers models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn


@dataclass(frozen=True)
class FamilyCase:
    """`config`: what makes the transformers model; `published`: keys that only published files have."""

    architecture: str
    config: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)


_SMALL = {"num_hidden_layers": 3, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 1}

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
}


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


def save_reference(case: FamilyCase, directory: Path) -> nn.Module:
    model = make_reference(case)
    model.save_pretrained(directory)  # type: ignore[operator]
    return model


def load_reference(directory: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager")
