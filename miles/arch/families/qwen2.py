"""Qwen2 and Qwen2.5 dense models (https://arxiv.org/abs/2412.15115): biases on query, key and value only."""

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
from miles.arch.spec import ArchSpec


def _from_hf_config(config: HfConfig) -> ArchSpec:
    attention = read_attention(config, None, qkv_bias=True, output_bias=False, qk_norm=False)
    return make_spec(config, FAMILY.name, "Qwen2ForCausalLM", dense_layers(config, attention))


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    return dense_hf_config(spec) | {"use_sliding_window": False, "sliding_window": None}


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    from_hf_config=_from_hf_config,
    to_hf_config=_to_hf_config,
    published_tensors=dense_published_tensors,
    layer_tensors=dense_layer_tensors,
    mtp_names=MTP_NAMES,
    shared_mtp_projection=True,
)
