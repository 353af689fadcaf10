"""Qwen3 dense models (https://arxiv.org/abs/2505.09388): GQA with query/key RMSNorm, SwiGLU MLPs."""

from __future__ import annotations

from typing import Any

from miles.arch.families.llama_like import (
    MTP_NAMES,
    dense_hf_config,
    dense_layer_tensors,
    dense_layers,
    dense_published_tensors,
    make_spec,
    read_attention,
)
from miles.arch.family import Family
from miles.arch.hf_config import HfConfig
from miles.arch.spec import ArchSpec, AttentionSpec


def read_qwen3_attention(config: HfConfig, head_dim: int | None) -> AttentionSpec:
    """The attention of Qwen3 and Qwen3-MoE: one flag for the biases of all four projections."""
    bias = config.flag("attention_bias", default=False)
    return read_attention(config, head_dim, qkv_bias=bias, output_bias=bias, qk_norm=True)


def qwen3_attention_config(spec: ArchSpec) -> dict[str, Any]:
    """The keys of config.json that Qwen3 and Qwen3-MoE add."""
    bias = spec.layers[0].attention.qkv_bias
    return {"attention_bias": bias, "use_sliding_window": False, "sliding_window": None}


def _from_hf_config(config: HfConfig) -> ArchSpec:
    layers = dense_layers(config, read_qwen3_attention(config, head_dim=128))
    return make_spec(config, FAMILY.name, "Qwen3ForCausalLM", layers)


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    return dense_hf_config(spec) | qwen3_attention_config(spec)


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    from_hf_config=_from_hf_config,
    to_hf_config=_to_hf_config,
    published_tensors=dense_published_tensors,
    layer_tensors=dense_layer_tensors,
    mtp_names=MTP_NAMES,
    shared_mtp_projection=True,
)
