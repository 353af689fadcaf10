"""What the families with experts share: how their config.json tells them, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from miles.arch.families.llama_like import attention_tensors, embedding_tensors, swiglu_tensors
from miles.arch.family import MOE_NAMES, Family, MoeNames, MtpNames, Shape
from miles.arch.hf_config import HfConfig
from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, MoeSpec

LayerTensors = Callable[[str, LayerSpec, int], Iterator[tuple[str, Shape]]]

MTP_AFTER_LAYERS = MtpNames(
    layer="model.layers.{layer}",
    embedding_norm="model.layers.{layer}.enorm.weight",
    hidden_norm="model.layers.{layer}.hnorm.weight",
    fc="model.layers.{layer}.eh_proj.weight",
    final_norm="model.layers.{layer}.shared_head.norm.weight",
    embedding_copy="model.layers.{layer}.embed_tokens.weight",
    head_copy="model.layers.{layer}.shared_head.head.weight",
)
"""As DeepSeek and GLM publish their MTP layers: behind the decoder's, each with a projection of its own."""


def read_sigmoid_moe(config: HfConfig, scaling: float) -> MoeSpec:
    """Experts under a sigmoid router with groups, a correction bias and shared experts, as DeepSeek-V3 has
    them and GLM took them over. `scaling`: routed_scaling_factor where config.json names none.
    """
    config.refuse("scoring_func", supported="sigmoid", default="sigmoid")
    config.refuse("topk_method", supported="noaux_tc", default="noaux_tc")
    width = config.count("moe_intermediate_size")
    moe = MoeSpec(
        num_experts=config.count("n_routed_experts"),
        top_k=config.count("num_experts_per_tok"),
        intermediate_size=width,
        norm_topk_prob=config.flag("norm_topk_prob", default=True),
        scoring="sigmoid",
        correction_bias=True,
        num_groups=config.count("n_group", default=1),
        top_groups=config.count("topk_group", default=1),
        routed_scaling=config.number("routed_scaling_factor", default=scaling),
        shared_size=width * config.count("n_shared_experts", default=1),
    )
    check_experts(config, moe)
    return moe


def check_experts(config: HfConfig, moe: MoeSpec) -> None:
    """Note what of the counts does not fit together."""
    experts, groups = moe.num_experts, moe.num_groups
    if moe.top_k > experts:
        config.problem(f"num_experts_per_tok = {moe.top_k} exceeds num_experts = {experts}")
    if groups == 1:
        return
    if experts % groups or experts < 2 * groups:
        config.problem(f"n_group = {groups} does not cut {experts} experts into groups of two or more")
    elif not moe.top_k * groups <= moe.top_groups * experts <= groups * experts:
        config.problem(f"topk_group = {moe.top_groups} of {groups} groups do not hold {moe.top_k} experts")


def first_dense_layers(config: HfConfig, attention: AttentionSpec, moe: MoeSpec) -> tuple[LayerSpec, ...]:
    """`first_k_dense_replace` dense layers, then layers with experts."""
    num_layers = config.count("num_hidden_layers")
    num_dense = config.whole("first_k_dense_replace", default=0)
    if num_dense >= num_layers:
        config.problem(f"first_k_dense_replace = {num_dense} leaves none of {num_layers} layers with experts")
    dense = LayerSpec(attention, DenseMlpSpec(config.count("intermediate_size")))
    return (dense,) * min(num_dense, num_layers - 1) + (LayerSpec(attention, moe),) * max(
        1, num_layers - num_dense
    )


def sigmoid_moe_config(spec: ArchSpec) -> dict[str, object]:
    """The keys of config.json that `read_sigmoid_moe` and `first_dense_layers` read."""
    moe, first = spec.moe, spec.layers[0].mlp
    assert moe is not None
    return {
        "intermediate_size": first.intermediate_size,
        "first_k_dense_replace": spec.moe_layers[0],
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.routed_scaling,
        "n_shared_experts": moe.shared_size // moe.intermediate_size,
    }


def moe_tensors(prefix: str, moe: MoeSpec, hidden_size: int, names: MoeNames) -> Iterator[tuple[str, Shape]]:
    """A block of experts; `prefix` is `model.layers.<i>`."""
    block = f"{prefix}.{names.block}"
    yield f"{block}.{names.router}", (moe.num_experts, hidden_size)
    if moe.correction_bias:
        yield f"{block}.{names.correction_bias}", (moe.num_experts,)
    if moe.stacked:
        experts, width = moe.num_experts, moe.intermediate_size
        yield f"{block}.experts.gate_up_proj", (experts, hidden_size, 2 * width)
        yield f"{block}.experts.down_proj", (experts, width, hidden_size)
    for expert in range(0 if moe.stacked else moe.num_experts):
        for part, shape in (
            (names.gate, (moe.intermediate_size, hidden_size)),
            (names.up, (moe.intermediate_size, hidden_size)),
            (names.down, (hidden_size, moe.intermediate_size)),
        ):
            yield f"{block}.experts.{expert}.{part}.weight", shape
    if moe.shared_size:
        yield from swiglu_tensors(f"{block}.{names.shared}", moe.shared_size, hidden_size)


def moe_layer_tensors(
    names: MoeNames = MOE_NAMES,
    attention: Callable[[str, AttentionSpec, int], Iterator[tuple[str, Shape]]] = attention_tensors,
) -> LayerTensors:
    """The tensors of a layer, dense or with experts."""

    def tensors(prefix: str, layer: LayerSpec, hidden_size: int) -> Iterator[tuple[str, Shape]]:
        yield from attention(prefix, layer.attention, hidden_size)
        if isinstance(layer.mlp, MoeSpec):
            yield from moe_tensors(prefix, layer.mlp, hidden_size, names)
        else:
            yield from swiglu_tensors(
                f"{prefix}.{names.dense_block}", layer.mlp.intermediate_size, hidden_size
            )

    return tensors


def published_tensors(
    layer_tensors: LayerTensors,
) -> Callable[[ArchSpec], Iterator[tuple[str, Shape]]]:
    """Everything but MTP layers."""

    def tensors(spec: ArchSpec) -> Iterator[tuple[str, Shape]]:
        yield from embedding_tensors(spec)
        for index, layer in enumerate(spec.layers):
            yield from layer_tensors(f"{spec.root}.layers.{index}", layer, spec.hidden_size)

    return tensors


def sigmoid_moe_family(
    name: str,
    architecture: str,
    read: Callable[[HfConfig], ArchSpec],
    write: Callable[[ArchSpec], dict[str, Any]],
    layer_tensors: LayerTensors,
) -> Family:
    """A row for `FAMILIES` of those whose MTP layers stand behind the decoder's."""
    return Family(
        name=name,
        architectures=(architecture,),
        from_hf_config=read,
        to_hf_config=write,
        published_tensors=published_tensors(layer_tensors),
        layer_tensors=layer_tensors,
        mtp_names=MTP_AFTER_LAYERS,
        shared_mtp_projection=False,
    )
