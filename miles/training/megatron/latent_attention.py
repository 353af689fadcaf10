"""Multi-head latent attention (DeepSeek) in megatron-core's own layers, over packed sequences.

Its module computes angles by itself, for one sequence from position 0 on; here every row has its own. With
tensor parallelism its down-projection hands every rank the rotated key that all heads share, but takes back
only a part of its gradient: `WholeOutput` joins it.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from miles.arch.spec import YarnScaling
from miles.training.megatron.attention import PackedRows, rotation_angles


class PackedLatentAttention(MLASelfAttention):
    """`MLASelfAttention` over `PackedRows`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rotary_pos_emb = RowAngles()
        # Transformer Engine's down-projections are whole on every rank.
        cut = isinstance(self.linear_kv_down_proj, ColumnParallelLinear)
        if cut and self.config.tensor_model_parallel_size > 1:
            assert self.config.sequence_parallel, "experts under tensor parallelism need it"
            self.linear_kv_down_proj.__class__ = WholeOutput

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedRows | None = None,
        inference_context: Any = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Queries and keys [T, heads of this rank, p + r], values, and the latents."""
        assert packed_seq_params is not None
        self.rotary_pos_emb.rows = packed_seq_params
        found: tuple[Tensor, ...] = super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params, inference_context, **options
        )
        return found


class RowAngles(nn.Module):
    """In place of Megatron's rotary embeddings: the angles of the rows at hand."""

    rows: PackedRows

    def get_rotary_seq_len(self, *_: Any) -> int:
        """Read by nobody: `rows` say how many there are."""
        assert self.rows.tokens_1T is not None
        return self.rows.tokens_1T.shape[1]

    def forward(self, length: int, packed_seq: bool = False) -> Tensor | tuple[Tensor, float]:
        """fp32 [T, 1, 1, r]; with YaRN also what rotated elements are multiplied by."""
        attention = self.rows.layers[0].attention
        rope = attention.rope
        found = rotation_angles(rope, attention.rotary_width, self.rows.angles_at)
        return (found, rope.scaling.magnitude) if isinstance(rope.scaling, YarnScaling) else found


class WholeOutput(ColumnParallelLinear):
    """A cut projection that hands each rank all columns of its share of the rows: whoever needs other rows
    gathers them, and so adds up their gradient.
    """

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """[t, 1, D] -> [t, 1, columns of all ranks]."""
        own, bias = super().forward(*arguments, **options)
        whole = gather_from_tensor_model_parallel_region(own)
        return scatter_to_sequence_parallel_region(whole), bias
