"""DeepSeek-V3.2 (https://arxiv.org/abs/2512.02556): DeepSeek-V3 with sparse attention by a lightning indexer.

The published indexer rounds its queries and keys to FP8 after a Hadamard transform, which leaves their
products as they are; here they are not rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from miles.arch.families.deepseek_v3 import latent_attention_config, layer_tensors, read_latent_attention
from miles.arch.families.llama_like import make_spec
from miles.arch.families.moe_like import (
    first_dense_layers,
    read_sigmoid_moe,
    sigmoid_moe_config,
    sigmoid_moe_family,
)
from miles.arch.hf_config import HfConfig
from miles.arch.spec import ArchSpec, AttentionSpec, IndexerSpec


def _read_attention(config: HfConfig) -> AttentionSpec:
    attention = read_latent_attention(config)
    indexer = IndexerSpec(
        num_heads=config.count("index_n_heads"),
        head_dim=config.count("index_head_dim"),
        top_k=config.count("index_topk"),
    )
    latent = attention.latent
    assert latent is not None
    if latent.query_rank is None:
        config.problem("q_lora_rank is missing: the indexer reads the latent of queries")
    if indexer.head_dim < latent.rotated_dim:
        config.problem(f"index_head_dim = {indexer.head_dim} is narrower than qk_rope_head_dim")
    return replace(attention, indexer=indexer)


def _from_hf_config(config: HfConfig) -> ArchSpec:
    moe = read_sigmoid_moe(config, scaling=2.5)
    config.refuse("moe_layer_freq", supported=1, default=1)
    layers = first_dense_layers(config, _read_attention(config), moe)
    return make_spec(config, FAMILY.name, "DeepseekV32ForCausalLM", layers, shared_mtp_projection=False)


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    indexer = spec.layers[0].attention.indexer
    assert indexer is not None
    return (
        latent_attention_config(spec)
        | sigmoid_moe_config(spec)
        | {
            "moe_layer_freq": 1,
            "index_n_heads": indexer.num_heads,
            "index_head_dim": indexer.head_dim,
            "index_topk": indexer.top_k,
        }
    )


FAMILY = sigmoid_moe_family(
    "deepseek_v32", "DeepseekV32ForCausalLM", _from_hf_config, _to_hf_config, layer_tensors
)
