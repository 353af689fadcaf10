"""Llama 3, 3.1, 3.2 and 3.3 (https://arxiv.org/abs/2407.21783): no head norms; slowed rotation from 3.1."""

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
    bias = config.flag("attention_bias", default=False)
    config.refuse("mlp_bias", supported=False, default=False)
    attention = read_attention(config, None, qkv_bias=bias, output_bias=bias, qk_norm=False)
    return make_spec(config, FAMILY.name, "LlamaForCausalLM", dense_layers(config, attention))


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    bias = spec.layers[0].attention.qkv_bias
    return dense_hf_config(spec) | {"attention_bias": bias, "mlp_bias": False}


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    from_hf_config=_from_hf_config,
    to_hf_config=_to_hf_config,
    published_tensors=dense_published_tensors,
    layer_tensors=dense_layer_tensors,
    mtp_names=MTP_NAMES,
    shared_mtp_projection=True,
)
