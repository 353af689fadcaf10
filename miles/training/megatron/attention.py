"""Attention over packed sequences in megatron-core's own layers, whose DotProductAttention refuses them.

A forward gives its layers one `PackedRows`. Transformer Engine reads Megatron's fields of it; the local
layers rotate every row by its own angle and attend with the object that the native decoder would use.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from miles.arch.spec import ArchSpec, AttentionSpec, LayerSpec, RopeSpec
from miles.models.attention import Attention
from miles.models.decoder import query_factors
from miles.models.norm import rms_norm
from miles.models.numerics import FAST
from miles.models.rotary import angles
from miles.models.segment_attention import SegmentAttention, pays_in_segments
from miles.training.megatron.context_parallel import ContextSplit, SplitAttention
from miles.training.megatron.layout import MegatronLayout
from miles.training.native.micro_batches import MicroBatch


@dataclass(frozen=True)
class RowIndex:
    """Of all T rows: queries [T, h, e], keys [T, 1, e] and weights [T, h, 1] of an indexer."""

    queries: Tensor
    keys: Tensor
    weights: Tensor


@dataclass
class PackedRows(PackedSeqParams):
    """The rows of a micro-batch as Megatron's layers take them.

    `tokens_1T` int64 [1, T], with `padding` rows at the end that make T a multiple of what the layout asks
    for. `angles_at` int64: the positions whose angles the rotation reads. `split`: with context parallelism
    they are the rows of this rank, and padding is where it says. `index`: on a layer's own copy, what its
    indexer says of the rows.
    """

    attention: Attention | None = None
    tokens_1T: Tensor | None = None
    positions_1T: Tensor | None = None
    angles_at: Tensor | None = None
    index: RowIndex | None = None
    padding: int = 0
    split: ContextSplit | None = None
    layers: tuple[LayerSpec, ...] = ()
    _angles: dict[tuple[RopeSpec, int], Tensor] = field(default_factory=dict)

    def layer_angles(self, layer: int) -> Tensor | None:
        """What a layer rotates with, see `rotation_angles`; layers that rotate alike share it. None where it
        does not rotate.
        """
        attention = self.layers[layer].attention
        if not attention.rotates:
            return None
        kind = attention.rope, attention.rotary_width
        if kind not in self._angles:
            assert self.angles_at is not None
            self._angles[kind] = rotation_angles(*kind, self.angles_at, attention.rope.interleaved)
        return self._angles[kind]


def micro_batch_rows(micro_batch: MicroBatch, layout: MegatronLayout, spec: ArchSpec) -> PackedRows:
    """What the layers read of a micro-batch."""
    cu_seqlens, shared = micro_batch.cu_seqlens_N1, micro_batch.shared
    rows = packed_rows(micro_batch.tokens_T, micro_batch.positions_T, cu_seqlens, layout, spec)
    if shared is not None:
        assert not rows.padding, "shared prompts are not padded"
        rows.attention = shared.attention(FAST, cu_seqlens.device)
    return rows


def packed_rows(
    tokens_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor, layout: MegatronLayout, spec: ArchSpec
) -> PackedRows:
    """What the layers read of sequences cut at `cu_seqlens` [N + 1]; padding rows are a sequence of their
    own.
    """
    # Sequence parallelism shares the rows out, and FP8 multiplies so many of them at once on every rank.
    unit = (layout.tp if layout.sequence_parallel else 1) * layout.options.aligned_rows
    if layout.cp > 1:
        rank = parallel_state.get_context_parallel_rank()
        return _split_rows(tokens_T, ContextSplit(cu_seqlens, layout.cp, rank, unit), layout, spec)
    padding = -len(tokens_T) % unit
    if padding:
        places = torch.arange(padding, device=tokens_T.device)
        tokens_T, positions_T = torch.cat([tokens_T, places * 0]), torch.cat([positions_T, places])
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + padding])
    rows = PackedRows(
        qkv_format="thd",
        tokens_1T=tokens_T.unsqueeze(0),
        positions_1T=positions_T.unsqueeze(0),
        padding=padding,
        layers=spec.layers + (spec.mtp.layers if spec.mtp else ()),
    )
    if layout.implementation == "transformer_engine" and not spec.has_indexer:
        _cut_by_megatron(rows, cu_seqlens)
        return rows
    # Seen by the rotation as one sequence whose angles are given row by row.
    whole = torch.tensor([0, len(tokens_T)], dtype=torch.int32, device=tokens_T.device)
    rows.cu_seqlens_q = rows.cu_seqlens_kv = whole
    rows.max_seqlen_q = rows.max_seqlen_kv = len(tokens_T)
    rows.angles_at = positions_T
    rows.attention = local_attention(cu_seqlens, spec)
    return rows


def _split_rows(tokens_T: Tensor, split: ContextSplit, layout: MegatronLayout, spec: ArchSpec) -> PackedRows:
    """This rank's rows of all sequences. Padding counts as rows of them: causal attention hides it."""
    rows = PackedRows(
        qkv_format="thd",
        tokens_1T=split.own(tokens_T).unsqueeze(0),
        positions_1T=split.positions.unsqueeze(0),
        split=split,
        layers=spec.layers,
    )
    _cut_by_megatron(rows, split.cu_seqlens)
    if layout.implementation == "local":
        rows.attention = SplitAttention(split)
    return rows


def _cut_by_megatron(rows: PackedRows, cu_seqlens: Tensor) -> None:
    """Rotation and attention take the angles of each sequence, and of its chunks, by `cu_seqlens`."""
    longest = int(cu_seqlens.diff().max())
    rows.cu_seqlens_q = rows.cu_seqlens_kv = cu_seqlens.int()
    rows.max_seqlen_q = rows.max_seqlen_kv = longest
    rows.angles_at = torch.arange(longest, device=cu_seqlens.device)


def local_attention(cu_seqlens: Tensor, spec: ArchSpec) -> Attention:
    """Attention within each sequence, as the native decoder would have it."""
    if spec.has_plain_attention and pays_in_segments(cu_seqlens):
        return SegmentAttention(cu_seqlens.numpy())
    return FAST.packed_attention(cu_seqlens)


def rotation_angles(rope: RopeSpec, width: int, positions: Tensor, interleaved: bool = False) -> Tensor:
    """fp32 [n, 1, 1, width] as Megatron's rotation takes them: the angles of both elements of a pair, which
    lie side by side or half a width apart. Latent attention puts them apart by itself.
    """
    table = angles(rope, width, int(positions.max()) + 1, positions.device)
    rows = table.index_select(0, positions)
    both = rows.repeat_interleave(2, -1) if interleaved else torch.cat((rows, rows), -1)
    return both[:, None, None, :]


class RotatedAttention(SelfAttention):
    """Self-attention that rotates with its own layer's angles, where Megatron hands all layers the same."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedRows,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[t, 1, D] -> the same, and the bias that is still to be added."""
        options["rotary_pos_emb"] = packed_seq_params.layer_angles(self.layer_number - 1)
        found: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, attention_mask, packed_seq_params=packed_seq_params, **options
        )
        return found


class PackedDotProductAttention(DotProductAttention):
    """Causal attention within each sequence: query [T, H, d], key and value [T, G, d] of this rank's heads,
    rotated -> [T, H d]. Values may be narrower than keys (latent attention): [T, H, v] -> [T, H v].
    """

    def __init__(
        self,
        config: TransformerConfig,
        *arguments: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **options: Any,
    ) -> None:
        # Megatron's own asserts that sequences are whole; here `PackedRows.attention` knows of them.
        whole = copy(config)
        whole.context_parallel_size = 1
        super().__init__(whole, *arguments, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None and packed_seq_params.attention is not None
        assert attention_mask is None and attention_bias is None, "packed sequences need neither"
        layer = self.layer_number - 1
        spec = packed_seq_params.layers[layer].attention
        dtype = query.dtype
        if spec.latent is None:
            query, key = self._adjusted(query, key, spec, packed_seq_params)
        query, key, value = (FAST.attention_input(part) for part in (query, key, value))
        return self._attended(packed_seq_params.attention, layer, query, key, value, spec).to(dtype)

    def _adjusted(
        self, query: Tensor, key: Tensor, spec: AttentionSpec, rows: PackedRows
    ) -> tuple[Tensor, Tensor]:
        """What the native decoder does to queries and keys behind the rotation."""
        if spec.qk_unit:
            ones = query.new_ones(spec.head_dim)
            query, key = (rms_norm(heads, ones, self.config.layernorm_epsilon) for heads in (query, key))
        if not spec.rotates:
            assert rows.positions_1T is not None
            factors_T = query_factors(spec.temperature, rows.positions_1T[0])
            query = (query * factors_T[:, None, None]).to(query.dtype)
        return (query if spec.query_factor == 1.0 else query * spec.query_factor), key

    def _attended(
        self, attention: Attention, layer: int, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
    ) -> Tensor:
        if spec.latent is None:
            return attention.attend(layer, query, key, value, spec)
        spec, width = by_head(spec), value.shape[-1]
        value = F.pad(value, (0, spec.head_dim - width))
        out = attention.attend(layer, query * spec.query_factor, key, value, spec)
        return out.view(*query.shape[:2], -1)[..., :width].flatten(1)


def by_head(spec: AttentionSpec) -> AttentionSpec:
    """Latent attention whose keys and values are made for each head, as attention over heads."""
    assert spec.latent is not None
    return replace(spec, num_kv_heads=spec.num_heads, head_dim=spec.latent.query_dim, latent=None)
