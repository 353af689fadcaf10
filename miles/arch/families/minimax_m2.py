"""MiniMax-M2 and M2.1 (https://huggingface.co/MiniMaxAI/MiniMax-M2): grouped-query attention with norms over
the whole width of queries and of keys, sigmoid-routed experts in every layer, none shared.

config.json speaks of MTP modules, which were not published: the decoder is read without them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from miles.arch.families.llama_like import MTP_NAMES, common_hf_config, make_spec, read_attention
from miles.arch.families.moe_like import check_experts, moe_layer_tensors, published_tensors
from miles.arch.family import Family, MoeNames
from miles.arch.hf_config import HfConfig
from miles.arch.spec import ArchSpec, AttentionSpec, LayerSpec, MoeSpec

NAMES = MoeNames(
    block="block_sparse_moe",
    correction_bias="e_score_correction_bias",
    gate="w1",
    up="w3",
    down="w2",
)


def _from_hf_config(config: HfConfig) -> ArchSpec:
    attention = _read_attention(config)
    config.refuse("scoring_func", supported="sigmoid", default="sigmoid")
    config.refuse("use_routing_bias", supported=True, default=True)
    if config.values.get("shared_intermediate_size"):
        config.problem("shared_intermediate_size is not supported (only 0)")
    moe = MoeSpec(
        num_experts=config.count("num_local_experts", "num_experts"),
        top_k=config.count("num_experts_per_tok"),
        intermediate_size=config.count("intermediate_size"),
        norm_topk_prob=True,
        scoring="sigmoid",
        correction_bias=True,
    )
    check_experts(config, moe)
    layers = (LayerSpec(attention, moe),) * config.count("num_hidden_layers")
    return make_spec(config, FAMILY.name, "MiniMaxM2ForCausalLM", layers)


def _read_attention(config: HfConfig) -> AttentionSpec:
    # Published configs name every layer's kind: 1 is softmax attention, the only one that M2 has.
    kinds = config.values.get("attn_type_list") or []
    if any(kind != 1 for kind in kinds):
        config.problem(f"attn_type_list names kinds {sorted(set(kinds))} (only 1 is supported)")
    config.refuse("qk_norm_type", supported="per_layer", default="per_layer")
    head_dim, width = config.count("head_dim", default=128), config.values.get("rotary_dim")
    rotated = 1.0 if width is None else config.count("rotary_dim") / head_dim
    attention = read_attention(
        config,
        head_dim,
        qkv_bias=False,
        output_bias=False,
        qk_norm=config.flag("use_qk_norm", default=True),
        rotated=rotated,
    )
    return replace(attention, qk_norm_over="width")


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    attention, moe = spec.layers[0].attention, spec.moe
    assert moe is not None
    return common_hf_config(spec) | {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": attention.qk_norm,
        "qk_norm_type": "per_layer",
        "rotary_dim": attention.rotary_width,
    }


_layer_tensors = moe_layer_tensors(NAMES)

FAMILY = Family(
    name="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    from_hf_config=_from_hf_config,
    to_hf_config=_to_hf_config,
    published_tensors=published_tensors(_layer_tensors),
    layer_tensors=_layer_tensors,
    mtp_names=MTP_NAMES,
    shared_mtp_projection=True,
    moe_names=NAMES,
)
