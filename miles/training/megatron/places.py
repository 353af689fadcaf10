"""Megatron's parameters as pieces of published tensors, whichever way the layout cuts them.

A local parameter consists of `Piece`s, each a contiguous range along one dimension of one published tensor:
attention fuses queries, keys and values group by group, SwiGLU stacks gate over up, tensor parallelism takes
a range of rows or columns, expert parallelism a range of experts, pipeline stages a range of layers. The same
map serves weights, gradients and moments, since it depends on names and shapes alone.

Legend: g query groups of this rank, n queries of a group, D head width, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from miles.arch.families import FAMILIES
from miles.arch.family import MoeNames
from miles.arch.spec import ArchSpec, AttentionSpec, LayerSpec
from miles.training.megatron.draft_model import DraftModel
from miles.training.megatron.mlp_places import mlp_place
from miles.training.megatron.model import PolicyModel
from miles.training.megatron.pieces import Piece, Place, Shard, columns, replicated, rows


def places(model: PolicyModel, spec: ArchSpec, shard: Shard) -> Iterator[Place]:
    """Every tensor of a chunk that `weights` gives, by its name in the chunk."""
    family = FAMILIES[spec.family]
    layers = {str(index): layer.layer_number - 1 for index, layer in enumerate(model.decoder.layers)}
    for name, parameter in weights(model):
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            yield _outside_layers(name, parameter, spec, shard)
        else:
            index = layers[match[1]]
            prefix = f"{spec.root}.layers.{index}"
            yield _in_layer(name, match[2], prefix, spec.layers[index], parameter, shard, family.moe_names)


def weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what stays as published, in buffers: the biases of routers, indexers."""
    yield from module.named_parameters()
    for name, buffer in module.named_buffers():
        if name.endswith(".expert_bias") or ".indexer." in name:
            yield name, buffer


def draft_places(model: DraftModel, spec: ArchSpec, shard: Shard) -> Iterator[Place]:
    """Every such tensor of the MTP layers, by its name in their module."""
    assert spec.mtp is not None
    family = FAMILIES[spec.family]
    for name, parameter in weights(model):
        match = re.fullmatch(r"mtp\.layers\.(\d+)\.(transformer_layer\.)?(.+)", name)
        assert match is not None, f"no place for {name}"
        depth, inside, local = int(match[1]), match[2], match[3]
        names, layer = family.mtp_names.at(depth, spec.num_layers), spec.mtp.layers[depth]
        if inside:
            yield _in_layer(name, local, names.layer, layer, parameter, shard, family.moe_names)
        elif local == "eh_proj.weight":
            yield Place(name, (rows(names.fc, parameter, shard.tp),), shard.writes_dense)
        else:
            theirs = {"enorm": names.embedding_norm, "hnorm": names.hidden_norm}
            theirs["final_layernorm"] = names.final_norm
            yield replicated(name, theirs[local.removesuffix(".weight")], parameter, shard)


def _outside_layers(name: str, parameter: Tensor, spec: ArchSpec, shard: Shard) -> Place:
    if name == "decoder.final_layernorm.weight":
        return replicated(name, f"{spec.root}.norm.weight", parameter, shard)
    assert name in ("embedding.word_embeddings.weight", "output_layer.weight"), f"no place for {name}"
    head = name == "output_layer.weight"
    if head and spec.value_head:
        return replicated(name, spec.head_name, parameter, shard)
    theirs = spec.head_name if head and not spec.tie_word_embeddings else spec.embedding_name
    start = min(shard.tp * parameter.shape[0], spec.vocab_size)
    valid = min(parameter.shape[0], spec.vocab_size - start)
    piece = Piece(theirs, 0, start, valid, lambda local: local[:valid])
    # The head of a tied model in a pipeline is a copy of the first stage's embedding.
    copy = head and spec.tie_word_embeddings
    return Place(name, (piece,), shard.writes_dense and not copy)


def _in_layer(
    name: str,
    local: str,
    prefix: str,
    layer: LayerSpec,
    parameter: Tensor,
    shard: Shard,
    names: MoeNames,
) -> Place:
    norms = _NORMS | (_OUTPUT_NORMS if layer.output_norms else {})
    if local.startswith("mlp.") and local not in norms:
        return mlp_place(name, local, prefix, layer.mlp, parameter, shard, names)
    if local.startswith("self_attention.") and layer.attention.latent is not None:
        return _in_latent_attention(name, local, f"{prefix}.self_attn", parameter, shard)
    if local in _QK_NORMS and layer.attention.qk_norm_over == "width":
        # Heads are cut, and their weights with them.
        return Place(name, (rows(f"{prefix}.{_QK_NORMS[local]}", parameter, shard.tp),), shard.writes_dense)
    if local in norms:
        return replicated(name, f"{prefix}.{norms[local]}", parameter, shard)
    if local.startswith("self_attention.linear_qkv."):
        kind = local.rpartition(".")[2]
        return Place(
            name, tuple(_qkv(f"{prefix}.self_attn", kind, layer.attention, shard)), shard.writes_dense
        )
    if local == "self_attention.linear_proj.weight":
        piece = columns(f"{prefix}.self_attn.o_proj.weight", parameter, shard.tp)
        return Place(name, (piece,), shard.writes_dense)
    assert local == "self_attention.linear_proj.bias", f"no place for {name}"
    return replicated(name, f"{prefix}.self_attn.o_proj.bias", parameter, shard)


_LATENT_ROWS = {
    "linear_q_proj.weight": "q_proj.weight",
    "linear_q_down_proj.weight": "q_a_proj.weight",
    "linear_q_up_proj.weight": "q_b_proj.weight",
    "linear_kv_down_proj.weight": "kv_a_proj_with_mqa.weight",
    "linear_kv_up_proj.weight": "kv_b_proj.weight",
}
_LATENT_NORMS = {
    "q_layernorm.weight": "q_a_layernorm.weight",
    "linear_q_up_proj.layer_norm_weight": "q_a_layernorm.weight",
    "kv_layernorm.weight": "kv_a_layernorm.weight",
    "linear_kv_up_proj.layer_norm_weight": "kv_a_layernorm.weight",
}
"""Megatron's own layers and Transformer Engine's."""


def _in_latent_attention(name: str, local: str, block: str, parameter: Tensor, shard: Shard) -> Place:
    local = local.removeprefix("self_attention.")
    if local.startswith("core_attention.indexer."):
        part, _, kind = local.removeprefix("core_attention.indexer.").rpartition(".")
        return replicated(name, f"{block}.indexer.{part.removeprefix('linear_')}.{kind}", parameter, shard)
    if local in _LATENT_NORMS:
        return replicated(name, f"{block}.{_LATENT_NORMS[local]}", parameter, shard)
    if local == "linear_proj.weight":
        return Place(name, (columns(f"{block}.o_proj.weight", parameter, shard.tp),), shard.writes_dense)
    assert local in _LATENT_ROWS, f"no place for {name}"
    theirs = f"{block}.{_LATENT_ROWS[local]}"
    if not getattr(parameter, "tensor_model_parallel", False) and shard.tp_size > 1:
        # Transformer Engine's down-projections are whole on every rank.
        return replicated(name, theirs, parameter, shard)
    return Place(name, (rows(theirs, parameter, shard.tp),), shard.writes_dense)


_QK_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_NORMS = _QK_NORMS | {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
"""Parameters that every tensor-parallel rank has whole: Megatron's own layers and Transformer Engine's."""

_OUTPUT_NORMS = {
    "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_feedforward_layernorm.weight",
    "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm.weight",
}
"""In layers whose blocks end with a norm (`LayerSpec.output_norms`)."""


def _qkv(prefix: str, kind: str, attention: AttentionSpec, shard: Shard) -> Iterator[Piece]:
    """linear_qkv holds, group by group, n query heads, a key head and a value head."""
    groups, queries = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads
    own, first, width = groups // shard.tp_size, groups // shard.tp_size * shard.tp, attention.head_dim
    heads = {"q": slice(0, queries), "k": slice(queries, queries + 1), "v": slice(queries + 1, queries + 2)}
    for letter, chosen in heads.items():
        rows = (chosen.stop - chosen.start) * width

        def view(local: Tensor, chosen: slice = chosen) -> Tensor:
            return local.view(own, queries + 2, width, *local.shape[1:])[:, chosen]

        yield Piece(f"{prefix}.{letter}_proj.{kind}", 0, first * rows, own * rows, view)
