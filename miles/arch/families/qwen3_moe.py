"""Qwen3 Mixture-of-Experts models: Qwen3 attention, softmax-routed SwiGLU experts, optional dense layers."""

from __future__ import annotations

from typing import Any

from miles.arch.families.llama_like import MTP_NAMES, common_hf_config, make_spec
from miles.arch.families.moe_like import check_experts, moe_layer_tensors, published_tensors
from miles.arch.families.qwen3 import qwen3_attention_config, read_qwen3_attention
from miles.arch.family import Family
from miles.arch.hf_config import HfConfig
from miles.arch.spec import ArchSpec, DenseMlpSpec, LayerSpec, MoeSpec


def _from_hf_config(config: HfConfig) -> ArchSpec:
    attention = read_qwen3_attention(config, head_dim=None)
    num_layers = config.count("num_hidden_layers")
    moe = _read_moe(config)
    dense_layers = _dense_layers(config, num_layers)
    dense = DenseMlpSpec(config.count("intermediate_size")) if dense_layers else None
    if len(dense_layers) == num_layers:
        config.problem("mlp_only_layers and decoder_sparse_step leave no layer with experts")
    layers = tuple(
        LayerSpec(attention, dense if dense is not None and i in dense_layers else moe)
        for i in range(num_layers)
    )
    return make_spec(config, FAMILY.name, "Qwen3MoeForCausalLM", layers)


def _read_moe(config: HfConfig) -> MoeSpec:
    moe = MoeSpec(
        num_experts=config.count("num_experts", "num_local_experts"),
        top_k=config.count("num_experts_per_tok"),
        intermediate_size=config.count("moe_intermediate_size"),
        norm_topk_prob=config.flag("norm_topk_prob", default=False),
    )
    check_experts(config, moe)
    return moe


def _dense_layers(config: HfConfig, num_layers: int) -> frozenset[int]:
    """Layers without experts: listed in mlp_only_layers, or skipped by decoder_sparse_step."""
    listed = config.indices("mlp_only_layers")
    if beyond := [i for i in listed if i >= num_layers]:
        config.problem(f"mlp_only_layers names {beyond}, the model has {num_layers} layers")
    step = config.count("decoder_sparse_step", default=1)
    return frozenset(i for i in range(num_layers) if i in listed or (i + 1) % step)


def _to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    moe = spec.moe
    assert moe is not None
    dense = {i: layer.mlp for i, layer in enumerate(spec.layers) if isinstance(layer.mlp, DenseMlpSpec)}
    config = (
        common_hf_config(spec)
        | qwen3_attention_config(spec)
        | {
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.intermediate_size,
            "norm_topk_prob": moe.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(dense),
        }
    )
    for mlp in dense.values():
        config["intermediate_size"] = mlp.intermediate_size
    return config


_layer_tensors = moe_layer_tensors()

FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    from_hf_config=_from_hf_config,
    to_hf_config=_to_hf_config,
    published_tensors=published_tensors(_layer_tensors),
    layer_tensors=_layer_tensors,
    mtp_names=MTP_NAMES,
    shared_mtp_projection=True,
)
