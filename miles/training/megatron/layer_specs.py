"""The modules of a stage's layers: megatron-core's, with ours where a model asks for something else."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from miles.arch.spec import ArchSpec, AttentionSpec
from miles.training.megatron.attention import PackedDotProductAttention, RotatedAttention
from miles.training.megatron.latent_attention import PackedLatentAttention
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.output_norm import with_output_norm
from miles.training.megatron.plus_one_norm import PlusOneNorm
from miles.training.megatron.sparse_attention import ChosenAttention, SparseLatentAttention
from miles.training.megatron.width_norm import WidthNorm


class BiasedRowParallelLinear(RowParallelLinear):
    """An output projection with a bias; Megatron's configuration only has one for all matrices of a layer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"bias": True})


def layer_specs(
    spec: ArchSpec, layout: MegatronLayout, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of a stage: Transformer Engine's, or Megatron's own with an attention that takes packed
    sequences.
    """
    engine = layout.implementation == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    # Layers of one kind are one object.
    kinds = {id(layer): layer.submodules for layer in block.layer_specs}.values()
    for layer in kinds:
        _take_attention(layer.self_attention, spec.layers[0].attention, engine)
    if spec.norm_plus_one and not engine:
        # Transformer Engine's norms read it from the configuration.
        block.layer_norm = PlusOneNorm
        for layer in kinds:
            _take_norms(layer, PlusOneNorm, spec.layers[0].attention)
    if spec.layers[0].output_norms:
        for layer in kinds:
            for submodules, name in (
                (layer.self_attention.submodules, "linear_proj"),
                (layer.mlp.submodules, "linear_fc2"),
            ):
                projection = getattr(submodules, name)
                setattr(submodules, name, with_output_norm(projection, block.layer_norm))
    return block


def _take_attention(block: ModuleSpec, attention: AttentionSpec, engine: bool) -> None:
    submodules = block.submodules
    if attention.latent is None:
        block.module = RotatedAttention
    elif attention.indexer is not None:
        block.module = SparseLatentAttention
    elif not engine:
        block.module = PackedLatentAttention
    if attention.indexer is not None:
        # Transformer Engine has no attention of this kind.
        submodules.core_attention = ModuleSpec(module=ChosenAttention, params={"attention": attention})
    elif not engine:
        submodules.core_attention = PackedDotProductAttention
    if attention.output_bias:
        submodules.linear_proj = BiasedRowParallelLinear
    if attention.qk_norm and attention.qk_norm_over == "width":
        heads = {"q_layernorm": attention.num_heads, "k_layernorm": attention.num_kv_heads}
        for name, count in heads.items():
            setattr(submodules, name, ModuleSpec(module=WidthNorm, params={"heads": count}))


def _take_norms(layer: Any, norm: type, attention: AttentionSpec) -> None:
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    if attention.qk_norm:
        submodules = layer.self_attention.submodules
        submodules.q_layernorm = submodules.k_layernorm = norm
