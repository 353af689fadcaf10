"""The native decoder's parameters under published names, and back.

Native parameters are fused (qkv, gate_up) and stacked (experts); a published tensor is always a slice of one
of them. So published tensors are views: reading them copies nothing, and writing through them fills a model.
The map depends on names and shapes alone: it serves gradients and optimizer moments just as well.

A model with MTP layers (`spec.mtp`) has theirs under native names that begin with `draft.`; one map serves
both components, so that they are saved, loaded and sent together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from miles.arch import ArchSpec, DenseMlpSpec, MoeSpec, check_shapes, optional_copies, published_tensors
from miles.arch.families import FAMILIES
from miles.arch.families.gemma3n import STREAM_LAYER, stream_names
from miles.arch.family import MoeNames
from miles.arch.spec import AttentionSpec, LayerSpec
from miles.errors import CheckpointError
from miles.weights.group import TensorGroup
from miles.weights.stacked_experts import restacked

View = tuple[str, str, Tensor]
"""Native name, published name, view."""

T = TypeVar("T")

DRAFT = "draft."
"""Begins the native name of an MTP parameter."""


def published_views(spec: ArchSpec, native: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Views of native-named tensors under published names.

    Args:
        native: by the names of `Decoder.named_parameters()`, each of the parameter's shape.
    """
    for _, name, view in views_with_origin(spec, native):
        yield name, view


def published_shapes(spec: ArchSpec, native: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of `published_views`; `native` may be of any kind, its data is not touched."""
    whole = {name: torch.empty(tensor.shape, device="meta") for name, tensor in native.items()}
    return {name: view.shape for name, view in published_views(spec, whole)}


def to_published(decoder: nn.Module, draft: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
    """The weights of a `Decoder`, and of its `MtpDraft`, under published names, as detached views."""
    return published_views(_spec(decoder, draft), _native(decoder, draft))


def mtp_to_published(draft: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of an `MtpDraft` alone, likewise."""
    native = joint({}, {name: parameter.detach() for name, parameter in draft.named_parameters()})
    return ((name, view) for _, name, view in _mtp(draft.spec, native))


def tensor_groups(decoder: nn.Module, draft: nn.Module | None = None) -> Iterator[TensorGroup]:
    """The weights of a `Decoder`, component `policy`, and of its `MtpDraft`, component `draft`, as units of
    transform and transport, one per native parameter.
    """
    views = views_with_origin(_spec(decoder, draft), _native(decoder, draft))
    for origin, group in groupby(views, key=lambda view: view[0]):
        _, names, tensors = zip(*group, strict=True)
        yield TensorGroup("draft" if origin.startswith(DRAFT) else "policy", names, tensors)


def load_published(
    decoder: nn.Module,
    items: Iterable[tuple[str, Tensor]],
    where: str = "weights",
    draft: nn.Module | None = None,
) -> None:
    """Fill a `Decoder`, and its `MtpDraft`, from published tensors (any dtype, any order), converting to its
    own dtype.

    Raises `CheckpointError` naming what is missing, unexpected, repeated or of another shape, or a second
    copy (`arch.optional_copies`) that differs from the first. Tensors of `spec.other_parts` are left.
    """
    load_views(_spec(decoder, draft), _native(decoder, draft), items, where)


def without_spare_mtp(
    full: ArchSpec, wanted: ArchSpec, items: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, less those of MTP layers that `wanted` lacks."""
    spare = _all_names(full) - _all_names(wanted)
    return ((name, tensor) for name, tensor in items if name not in spare)


@torch.no_grad()
def load_views(
    spec: ArchSpec, native: Mapping[str, Tensor], items: Iterable[tuple[str, Tensor]], where: str
) -> None:
    """`load_published` for any native-named tensors, e.g. optimizer moments."""
    copies = optional_copies(spec)
    views = {name: view for name, view in published_views(spec, native) if name not in copies}

    def store(name: str, tensor: Tensor) -> None:
        views[name].copy_(tensor)

    def differs(name: str, tensor: Tensor) -> bool:
        return not torch.equal(tensor.to(views[name]), views[name])

    load_each(spec, {name: view.shape for name, view in views.items()}, store, differs, items, where)


def load_each(
    spec: ArchSpec,
    shapes: Mapping[str, torch.Size],
    store: Callable[[str, Tensor], None],
    differs: Callable[[str, Tensor], bool],
    items: Iterable[tuple[str, Tensor]],
    where: str,
) -> None:
    """Hand every published tensor to `store` once, under the rules of `load_published`; experts may come
    split where the model has them stacked.

    Args:
        shapes: what the model has under published names.
        differs: whether a tensor is not the one stored under a name.
    """
    seen: dict[str, tuple[int, ...]] = {}
    copies: dict[str, Tensor] = {}
    originals = optional_copies(spec)
    for name, tensor in restacked(spec, items):
        if name.startswith(spec.other_parts):
            continue
        if name in seen:
            raise CheckpointError(f"{name} comes twice", where=where)
        seen[name] = tuple(tensor.shape)
        if name in originals:
            copies[name] = tensor
        elif shapes.get(name) == tensor.shape:
            store(name, tensor)
    check_shapes(spec, seen, where)
    for name, tensor in copies.items():
        if differs(originals[name], tensor):
            raise _other_copy(spec, name, originals[name], where)


def _other_copy(spec: ArchSpec, name: str, original: str, where: str) -> CheckpointError:
    if name == spec.head_name:
        return CheckpointError(
            f"{name} differs from {original}, but tie_word_embeddings is true",
            where=where,
            fix=f"set tie_word_embeddings to false in config.json, or leave {spec.head_name} out",
        )
    return CheckpointError(
        f"{name} differs from {original}: MTP layers of their own tables are not supported",
        where=where,
        fix=f"leave {name} out, or load the model without its MTP layers: --mtp-num-layers 0",
    )


def _all_names(spec: ArchSpec) -> set[str]:
    return {*published_tensors(spec), *optional_copies(spec)}


def native_parameters(decoder: nn.Module, draft: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """The parameters of both under native names."""
    own = dict(decoder.named_parameters())
    return own if draft is None else joint(own, dict(draft.named_parameters()))


def joint(policy: Mapping[str, T], draft: Mapping[str, T]) -> dict[str, T]:
    """Values of both components under native names."""
    return dict(policy) | {DRAFT + name: value for name, value in draft.items()}


def _native(decoder: nn.Module, draft: nn.Module | None) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in native_parameters(decoder, draft).items()}


def _spec(decoder: nn.Module, draft: nn.Module | None) -> ArchSpec:
    spec: ArchSpec = decoder.spec if draft is None else draft.spec
    return spec


def views_with_origin(spec: ArchSpec, native: Mapping[str, Tensor]) -> Iterator[View]:
    """Every published tensor as a contiguous view of a native one, and the name of that one.

    Each native tensor is looked up once, when its first view is asked for.
    """
    names = FAMILIES[spec.family].moe_names
    yield "embed", spec.embedding_name, native["embed"]
    for index, layer in enumerate(spec.layers):
        yield from _layer(layer, native, f"layers.{index}", f"{spec.root}.layers.{index}", names)
        if spec.streams is not None:
            for ours, theirs in STREAM_LAYER.items():
                yield _whole(native, f"layers.{index}.{ours}", f"{spec.root}.layers.{index}.{theirs}")
    yield "final_norm", f"{spec.root}.norm.weight", native["final_norm"]
    if spec.streams is not None:
        for ours, theirs in stream_names(spec.streams).items():
            yield _whole(native, f"streams.{ours}", f"{spec.root}.{theirs}")
    if not spec.tie_word_embeddings:
        yield "head", spec.head_name, native["head"]
    if spec.mtp is not None:
        yield from _mtp(spec, native)
        for copy, original in FAMILIES[spec.family].mtp_copies(spec):
            ours = "head" if original == spec.head_name else "embed"
            yield ours, copy, native[ours]


def _mtp(spec: ArchSpec, native: Mapping[str, Tensor]) -> Iterator[View]:
    assert spec.mtp is not None
    for depth in range(spec.mtp.num_projections):
        names = FAMILIES[spec.family].mtp_names.at(depth, spec.num_layers)
        for part in ("embedding_norm", "hidden_norm", "fc", "final_norm"):
            yield _whole(native, f"{DRAFT}projections.{depth}.{part}", getattr(names, part))
    for depth, layer in enumerate(spec.mtp.layers):
        prefix = FAMILIES[spec.family].mtp_names.at(depth, spec.num_layers).layer
        names_of_experts = FAMILIES[spec.family].moe_names
        yield from _layer(layer, native, f"{DRAFT}layers.{depth}", prefix, names_of_experts)


def dense_layer_views(
    layer: LayerSpec, native: Mapping[str, Tensor], name: str
) -> Iterator[tuple[str, Tensor]]:
    """Attention and MLP of one layer whose native names are `attention.…` and `mlp.…`."""
    views = chain(
        _attention(layer.attention, native, "attention", f"{name}.self_attn"),
        _dense_mlp(native, "mlp", f"{name}.mlp"),
    )
    return ((theirs, view) for _, theirs, view in views)


def _layer(
    layer: LayerSpec, native: Mapping[str, Tensor], ours: str, theirs: str, names: MoeNames
) -> Iterator[View]:
    yield _whole(native, f"{ours}.input_norm", f"{theirs}.input_layernorm.weight")
    yield from _attention(layer.attention, native, f"{ours}.attention", f"{theirs}.self_attn")
    yield from _norms_around_mlp(layer, native, ours, theirs)
    if isinstance(layer.mlp, DenseMlpSpec):
        yield from _dense_mlp(native, f"{ours}.mlp", f"{theirs}.{names.dense_block}")
    else:
        yield from _moe_mlp(layer.mlp, native, f"{ours}.mlp", f"{theirs}.{names.block}", names)


def _norms_around_mlp(
    layer: LayerSpec, native: Mapping[str, Tensor], ours: str, theirs: str
) -> Iterator[View]:
    """Where blocks have a norm behind them too, `post_attention_layernorm` is that of attention."""
    if not layer.output_norms:
        yield _whole(native, f"{ours}.post_norm", f"{theirs}.post_attention_layernorm.weight")
        return
    yield _whole(native, f"{ours}.attention_output_norm", f"{theirs}.post_attention_layernorm.weight")
    yield _whole(native, f"{ours}.post_norm", f"{theirs}.pre_feedforward_layernorm.weight")
    yield _whole(native, f"{ours}.mlp_output_norm", f"{theirs}.post_feedforward_layernorm.weight")


def _whole(native: Mapping[str, Tensor], ours: str, theirs: str) -> View:
    return ours, theirs, native[ours]


def _attention(spec: AttentionSpec, native: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[View]:
    if spec.latent is not None:
        yield from _latent_attention(spec, native, ours, theirs)
        return
    letters = "qkv" if spec.keys_of is None else "q"
    widths = (spec.query_width, spec.kv_width, spec.kv_width)[: len(letters)]
    fused = {"qkv": "weight"} | ({"qkv_bias": "bias"} if spec.qkv_bias else {})
    for name, kind in fused.items():
        for letter, view in zip(letters, native[f"{ours}.{name}"].split(widths), strict=True):
            yield f"{ours}.{name}", f"{theirs}.{letter}_proj.{kind}", view
    if spec.qk_norm:
        yield _whole(native, f"{ours}.q_norm", f"{theirs}.q_norm.weight")
        if spec.keys_of is None:
            yield _whole(native, f"{ours}.k_norm", f"{theirs}.k_norm.weight")
    yield _whole(native, f"{ours}.o", f"{theirs}.o_proj.weight")
    if spec.output_bias:
        yield _whole(native, f"{ours}.o_bias", f"{theirs}.o_proj.bias")


_LATENT_NAMES = {
    "kv_latent_norm": "kv_a_layernorm.weight",
    "kv_up": "kv_b_proj.weight",
    "o": "o_proj.weight",
}
_INDEXER_NAMES = {
    "indexer.q": "indexer.wq_b.weight",
    "indexer.k": "indexer.wk.weight",
    "indexer.k_norm": "indexer.k_norm.weight",
    "indexer.k_norm_bias": "indexer.k_norm.bias",
    "indexer.weights": "indexer.weights_proj.weight",
}


def _latent_attention(
    spec: AttentionSpec, native: Mapping[str, Tensor], ours: str, theirs: str
) -> Iterator[View]:
    assert spec.latent is not None
    rank, *key_value = spec.latent.down_widths
    down = native[f"{ours}.down"]
    if rank:
        yield f"{ours}.down", f"{theirs}.q_a_proj.weight", down[:rank]
    yield f"{ours}.down", f"{theirs}.kv_a_proj_with_mqa.weight", down[rank : rank + sum(key_value)]
    if rank:
        yield _whole(native, f"{ours}.q_latent_norm", f"{theirs}.q_a_layernorm.weight")
    yield _whole(native, f"{ours}.q", f"{theirs}.{'q_b_proj' if rank else 'q_proj'}.weight")
    for name, published in (_LATENT_NAMES | (_INDEXER_NAMES if spec.indexer else {})).items():
        yield _whole(native, f"{ours}.{name}", f"{theirs}.{published}")


def _dense_mlp(native: Mapping[str, Tensor], ours: str, theirs: str) -> Iterator[View]:
    gate, up = native[f"{ours}.gate_up"].chunk(2)
    yield f"{ours}.gate_up", f"{theirs}.gate_proj.weight", gate
    yield f"{ours}.gate_up", f"{theirs}.up_proj.weight", up
    yield _whole(native, f"{ours}.down", f"{theirs}.down_proj.weight")


def _moe_mlp(
    moe: MoeSpec, native: Mapping[str, Tensor], ours: str, theirs: str, names: MoeNames
) -> Iterator[View]:
    yield _whole(native, f"{ours}.router", f"{theirs}.{names.router}")
    if moe.correction_bias:
        yield _whole(native, f"{ours}.correction_bias", f"{theirs}.{names.correction_bias}")
    if moe.stacked:
        yield _whole(native, f"{ours}.gate_up", f"{theirs}.experts.gate_up_proj")
        yield _whole(native, f"{ours}.down", f"{theirs}.experts.down_proj")
    else:
        yield from _experts(native, ours, theirs, names)
    if moe.shared_size:
        yield from _dense_mlp(native, f"{ours}.shared", f"{theirs}.{names.shared}")


def _experts(native: Mapping[str, Tensor], ours: str, theirs: str, names: MoeNames) -> Iterator[View]:
    for expert, gate_up in enumerate(native[f"{ours}.gate_up"]):
        gate, up = gate_up.chunk(2)
        yield f"{ours}.gate_up", f"{theirs}.experts.{expert}.{names.gate}.weight", gate
        yield f"{ours}.gate_up", f"{theirs}.experts.{expert}.{names.up}.weight", up
    for expert, down in enumerate(native[f"{ours}.down"]):
        yield f"{ours}.down", f"{theirs}.experts.{expert}.{names.down}.weight", down
