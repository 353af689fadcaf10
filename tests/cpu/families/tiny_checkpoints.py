"""A tiny random checkpoint of most model families, made by transformers, of awkward shapes; those with a
router bias, shared experts or latents are in `tests/cpu/models/family_cases.py`.

Windows and chunks are shorter than the sequences that the tests read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

torch.set_num_threads(1)
LENGTHS = (7, 1, 23, 12)
_EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass(frozen=True)
class Case:
    """`model`: class of transformers; `config`: what its configuration is given."""

    model: str
    config: dict[str, Any]
    vocab_size: int
    norm_center: float = 1.0
    """Mean of the norms' random weights."""
    inside: dict[str, Any] = field(default_factory=dict)
    """`text_config`, where the language model is a part of a larger one; `config` is what is around it."""

    def model_class(self) -> Any:
        return getattr(transformers, self.model)

    def make(self, seed: int = 0, std: float = 0.3) -> nn.Module:
        """Every parameter is random, norms and biases too: a mix-up would show."""
        more = {"text_config": self.inside} if self.inside else {}
        config = self.model_class().config_class(**self.config, **more)
        # transformers' grouped kernel refuses odd expert widths; its plain loop takes all.
        model = self.model_class()._from_config(config, **_EAGER)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=std, generator=generator)
                parameter.add_(self.norm_center if "norm" in name else 0.0)
        return model.eval()

    def save(self, directory: Path, **made: Any) -> nn.Module:
        model = self.make(**made)
        model.save_pretrained(directory)
        return model

    def load(self, directory: Path) -> nn.Module:
        return self.model_class().from_pretrained(directory, **_EAGER).eval()


_DENSE = {
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GEMMA = {
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_VISION = {
    "vision_config": {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 4,
}
_GEMMA3 = _GEMMA | {
    "sliding_window": 5,
    "sliding_window_pattern": 3,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}

_LLAMA4 = {
    "num_hidden_layers": 5,
    "max_position_embeddings": 128,
    "attention_chunk_size": 6,
    "no_rope_layer_interval": 3,
    "floor_scale": 4,
    "attn_scale": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    "bos_token_id": None,
    "eos_token_id": None,
}

_GEMMA3N = _GEMMA3 | {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 3,
    "activation_sparsity_pattern": [0.7, 0.6, 0.0, 0.0, 0.0, 0.0],
    "intermediate_size": [26, 22, 18, 26, 22, 18],
    "final_logit_softcapping": 9.0,
}

_LLAMA4_VISION = {
    "vision_config": {
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 8,
        "projector_input_dim": 8,
        "projector_output_dim": 8,
    }
}

CASES: dict[str, Case] = {
    "qwen2": Case(
        "Qwen2ForCausalLM",
        _DENSE
        | {"vocab_size": 43, "hidden_size": 24, "intermediate_size": 34, "tie_word_embeddings": True}
        | {"num_attention_heads": 6, "num_key_value_heads": 2},
        vocab_size=43,
    ),
    "qwen3": Case(
        "Qwen3ForCausalLM",
        _DENSE
        | {"vocab_size": 37, "hidden_size": 20, "intermediate_size": 26, "tie_word_embeddings": True}
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10},
        vocab_size=37,
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        _DENSE
        | {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 28, "moe_intermediate_size": 12}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
        | {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [1]},
        vocab_size=53,
    ),
    "llama": Case(
        "LlamaForCausalLM",
        _DENSE
        | {"vocab_size": 47, "hidden_size": 32, "intermediate_size": 24, "tie_word_embeddings": True}
        | {"num_attention_heads": 2, "num_key_value_heads": 1}
        | {
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
        },
        vocab_size=47,
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        _GEMMA
        | {"vocab_size": 43, "hidden_size": 30, "intermediate_size": 26, "head_dim": 10}
        | {"num_attention_heads": 6, "num_key_value_heads": 2, "query_pre_attn_scalar": 7}
        | {"sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0},
        vocab_size=43,
        norm_center=0.0,
    ),
    "gemma3_text": Case(
        "Gemma3ForCausalLM",
        _GEMMA3
        | {"vocab_size": 37, "hidden_size": 28, "intermediate_size": 34, "head_dim": 6}
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 11},
        vocab_size=37,
        norm_center=0.0,
    ),
    "gemma3": Case(
        "Gemma3ForConditionalGeneration",
        _VISION,
        vocab_size=41,
        norm_center=0.0,
        inside=_GEMMA3
        | {"vocab_size": 41, "hidden_size": 24, "intermediate_size": 20, "head_dim": 8}
        | {"num_attention_heads": 3, "num_key_value_heads": 3, "query_pre_attn_scalar": 8},
    ),
    "gemma3n_text": Case(
        "Gemma3nForCausalLM",
        _GEMMA3N
        | {"vocab_size": 45, "vocab_size_per_layer_input": 40, "hidden_size": 28, "head_dim": 6}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "laurel_rank": 5}
        | {"hidden_size_per_layer_input": 6, "altup_num_inputs": 3},
        vocab_size=45,
    ),
    "llama4_text": Case(
        "Llama4ForCausalLM",
        _LLAMA4
        | {"vocab_size": 39, "hidden_size": 20, "intermediate_size": 14, "head_dim": 6}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3}
        | {"intermediate_size_mlp": 22, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
        vocab_size=39,
    ),
    "llama4": Case(
        "Llama4ForConditionalGeneration",
        _LLAMA4_VISION,
        vocab_size=33,
        inside=_LLAMA4
        | {"vocab_size": 33, "hidden_size": 18, "intermediate_size": 10, "head_dim": 4}
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "num_local_experts": 5}
        | {"num_experts_per_tok": 2, "use_qk_norm": False},
    ),
}


def sequences(case: Case, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [torch.randint(case.vocab_size, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def reference_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """[T, V] of one sequence."""
    return model(input_ids=tokens[None], use_cache=False).logits[0]
