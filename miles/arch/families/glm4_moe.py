"""GLM-4.5, 4.5-Air, 4.6 and 4.7 (https://arxiv.org/abs/2508.06471): grouped-query attention that rotates half
of each head, sigmoid-routed experts beside a shared one, MTP layers.
"""

from __future__ import annotations

from typing import Any

from miles.arch.families.llama_like import common_hf_config, make_spec, read_attention
from miles.arch.families.moe_like import (
    first_dense_layers,
    moe_layer_tensors,
    read_sigmoid_moe,
    sigmoid_moe_config,
    sigmoid_moe_family,
)
from miles.arch.hf_config import PARTIAL_ROTARY, HfConfig
from miles.arch.spec import ArchSpec

ROTATED = 0.5
"""Part of a head that is rotated where config.json names none."""


def _from_hf_config(config: HfConfig) -> ArchSpec:
    attention = read_attention(
        config,
        None,
        qkv_bias=config.flag("attention_bias", default=False),
        output_bias=False,
        qk_norm=config.flag("use_qk_norm", default=False),
        rotated=ROTATED,
    )
    layers = first_dense_layers(config, attention, read_sigmoid_moe(config, scaling=1.0))
    return make_spec(config, FAMILY.name, "Glm4MoeForCausalLM", layers, shared_mtp_projection=False)


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    attention = spec.layers[0].attention
    return (
        common_hf_config(spec)
        | sigmoid_moe_config(spec)
        | {
            "attention_bias": attention.qkv_bias,
            "use_qk_norm": attention.qk_norm,
            PARTIAL_ROTARY: attention.rotary_width / attention.head_dim,
        }
    )


FAMILY = sigmoid_moe_family(
    "glm4_moe", "Glm4MoeForCausalLM", _from_hf_config, _to_hf_config, moe_layer_tensors()
)
