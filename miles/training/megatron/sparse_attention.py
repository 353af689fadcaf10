"""Latent attention to the keys that an indexer chooses (DeepSeek-V3.2), in megatron-core's own layers.

Megatron's own class for it (`experimental_attention_variant.dsa`) is not used: it refuses packed sequences
and anything but bf16, rotates the last elements of the indexer's heads where the published model rotates the
first, and pairs them otherwise. Names are its names, so that its checkpoints hold the same tensors. The
indexer stays as published: its weights are buffers, which no optimizer sees, whole on every rank.

Legend: T rows, t those of this rank (sequence parallelism), H heads of this rank, d key width, v value width,
D hidden, R rank of queries; h heads of the indexer, e their width.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from miles.arch.spec import AttentionSpec
from miles.models.attention import PackedAttention
from miles.models.latent_attention import EPS
from miles.models.norm import rms_norm
from miles.models.numerics import FAST
from miles.models.sparse_attention import attend_heads_to_chosen
from miles.training.megatron.attention import PackedRows, RowIndex, by_head
from miles.training.megatron.latent_attention import PackedLatentAttention


class SparseLatentAttention(PackedLatentAttention):
    """`PackedLatentAttention` around a `ChosenAttention`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedRows,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[t, 1, D] -> the same, and the bias that is still to be added."""
        # What a layer's index says lives as long as its attention may run again in backward.
        found: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states, attention_mask, packed_seq_params=copy(packed_seq_params), **options
        )
        return found

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
        inference_context: Any = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """As `PackedLatentAttention`; tells the rows what the indexer says of them."""
        assert packed_seq_params is not None
        found = super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params, inference_context, **options
        )
        q_latent = found[3].detach()
        # Transformer Engine norms latents within the projection behind them.
        norm: Tensor | None = getattr(self.linear_q_up_proj, "layer_norm_weight", None)
        if norm is not None:
            q_latent = rms_norm(q_latent, norm.detach(), EPS)
        x = hidden_states.detach().squeeze(1)
        packed_seq_params.index = self.core_attention.indexer(x, q_latent, packed_seq_params)
        return found


class ChosenAttention(MegatronModule):
    """Causal attention of query [T, H, d] to the keys [T, H, d] that the indexer chooses in its own sequence,
    and their values [T, H, v] -> [T, H v].
    """

    def __init__(self, config: TransformerConfig, attention: AttentionSpec, **_: Any) -> None:
        super().__init__(config)
        self.attention = attention
        self.indexer = Indexer(config, attention)

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
        assert packed_seq_params is not None and packed_seq_params.index is not None
        assert attention_mask is None and attention_bias is None, "packed sequences need neither"
        sequences, index = packed_seq_params.attention, packed_seq_params.index
        assert isinstance(sequences, PackedAttention) and self.attention.indexer is not None
        query = query * by_head(self.attention).query_factor
        parts = query, key, value, index.queries, index.keys, index.weights
        queries, keys, values, index_q, index_keys, weights = (
            sequences.grid.lay_out(part, sequences.max_len) for part in parts
        )
        heads, index_heads = (queries, keys, values), (index_q, index_keys.squeeze(1), weights.squeeze(-1))
        out = attend_heads_to_chosen(*heads, *index_heads, self.attention.indexer)
        return sequences.grid.flatten(out)


class Indexer(nn.Module):
    """Frozen: linear_wq_b [h e, R], linear_wk [e, D] under a layer norm, linear_weights_proj [h, D]."""

    def __init__(self, config: TransformerConfig, attention: AttentionSpec) -> None:
        super().__init__()
        indexer, latent = attention.indexer, attention.latent
        assert indexer is not None and latent is not None and latent.query_rank is not None
        self._attention, self._gathers = attention, config.sequence_parallel
        self._widths = indexer.num_heads * indexer.head_dim, indexer.head_dim, indexer.num_heads
        hidden, dtype = config.hidden_size, config.params_dtype
        self.linear_wq_b = nn.Linear(latent.query_rank, self._widths[0], bias=False, dtype=dtype)
        self.linear_wk = nn.Linear(hidden, indexer.head_dim, bias=False, dtype=dtype)
        self.k_norm = nn.LayerNorm(indexer.head_dim, EPS, dtype=dtype)
        self.linear_weights_proj = nn.Linear(hidden, indexer.num_heads, bias=False, dtype=dtype)
        for part in self.children():
            _freeze(part)

    @torch.no_grad()
    def forward(self, x: Tensor, q_latent: Tensor, rows: PackedRows) -> RowIndex:
        """x [t, D], q_latent [t, R] -> what it says of all T rows."""
        said = torch.cat(
            (self.linear_wq_b(q_latent), self.k_norm(self.linear_wk(x)), self.linear_weights_proj(x)), -1
        )
        if self._gathers:
            group = parallel_state.get_tensor_model_parallel_group()
            said = gather_from_sequence_parallel_region(said, group=group)
        q, key, weights = said.split(self._widths, -1)
        assert rows.angles_at is not None
        heads = torch.cat((q.unflatten(-1, (-1, key.shape[-1])), key.unsqueeze(1)), 1)
        rotation = FAST.rotations(self._attention, int(rows.angles_at.max()) + 1, rows.angles_at)
        turned = FAST.rotate(heads, rotation)
        return RowIndex(turned[:, :-1], turned[:, -1:], weights.unsqueeze(-1))


def _freeze(module: nn.Module) -> None:
    """Its parameters become buffers: whoever asks the model for gradients does not ask them."""
    for name, parameter in [*module.named_parameters(recurse=False)]:
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
