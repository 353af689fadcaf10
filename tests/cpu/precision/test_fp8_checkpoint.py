"""Our block FP8 checkpoint, read by transformers' own FP8 loader, which dequantises on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles.arch import ArchSpec, published_tensors, spec_from_hf_config, to_hf_config
from miles.arch.precision import NumberFormat, precision_policy
from miles.arch.quantization_config import quantization_config
from miles.precision.weight_format import dequantised, published, quantised

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def model_weights(spec: ArchSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).bfloat16() * 0.05 + (len(shape) == 1)
        for name, shape in published_tensors(spec).items()
    }


@pytest.mark.parametrize("scales", ["fp32", "pow2"])
def test_transformers_loads_our_block_fp8_checkpoint(tmp_path: Path, scales: Any) -> None:
    spec = spec_from_hf_config(CONFIG)
    policy = precision_policy(spec, "bf16", NumberFormat("fp8", scales), last_layers=1)
    tensors, expected = {}, {}
    for name, weight in model_weights(spec).items():
        if policy.storage(name).is_plain:
            tensors[name] = expected[name] = weight
        else:
            stored = quantised(policy.storage(name), weight)
            tensors |= published(name, stored)
            expected[name] = dequantised(stored, torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shapes = published_tensors(spec)
    config = to_hf_config(spec) | {"quantization_config": quantization_config(policy, shapes)}
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    plain = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG)).to(torch.bfloat16)
    plain.load_state_dict(_fused(expected, spec))
    for (name, mine), theirs in zip(plain.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert not torch.equal(expected["model.layers.0.self_attn.q_proj.weight"],
                           model_weights(spec)["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


def _fused(weights: dict[str, Tensor], spec: ArchSpec) -> dict[str, Tensor]:
    """Published tensors under the names of transformers' model, which stacks experts."""
    found = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        each = [[weights[f"{prefix}.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")] for e in range(4)]
        found[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in each])
        found[f"{prefix}.down_proj"] = torch.stack([down for _, _, down in each])
    return found
