"""The MTP layers of a Megatron trainer: megatron-core's own modules under its own names (`mtp.layers.N`).

They live on the last pipeline stage beside the policy's chunk, not in it: no gradient goes from one to the
other, and each has its own norm and clipping. `models.mtp` says what a depth computes.

Legend: T rows, t those of this rank (sequence parallelism), R of them taught at one depth, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock
from torch import Tensor

from miles.arch.spec import ArchSpec
from miles.errors import RunError
from miles.models.unrolled_attention import UnrolledAttention
from miles.training.megatron.attention import local_attention, packed_rows
from miles.training.megatron.head import whole_rows
from miles.training.megatron.layer_specs import layer_specs
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.routes import Deciding


class DraftModel(MegatronModule):
    """The MTP layers of `spec`, which share the policy's embedding and head without a gradient to them."""

    def __init__(self, spec: ArchSpec, layout: MegatronLayout, config: TransformerConfig) -> None:
        super().__init__(config)
        assert spec.mtp is not None
        self.spec, self.layout = spec, layout
        stages = layout.virtual_stages(spec.num_layers)
        self.vp_stage = None if stages is None else stages - 1
        block = get_gpt_mtp_block_spec(
            config,
            layer_specs(spec, layout, config, self.vp_stage),
            use_transformer_engine=layout.implementation == "transformer_engine",
            vp_stage=self.vp_stage,
        )
        self.mtp = MultiTokenPredictionBlock(config=config, spec=block, vp_stage=self.vp_stage)
        for layer in self.mtp.layers:
            if hasattr(layer.transformer_layer.mlp, "router"):
                # Routes of a rollout are those of the trunk.
                assert spec.moe is not None
                layer.transformer_layer.mlp.router.router_replay = Deciding(spec.moe)
        RouterReplay.clear_global_router_replay_instances()
        if spec.mtp.shared_projection:
            first, *others = self.mtp.layers
            for layer in others:
                layer.enorm, layer.hnorm = first.enorm, first.hnorm
                layer.eh_proj, layer.final_layernorm = first.eh_proj, first.final_layernorm

    @property
    def num_layers(self) -> int:
        return len(self.mtp.layers)

    def chain(
        self,
        hidden_t1D: Tensor,
        tokens: Sequence[Tensor],
        rows: Sequence[Tensor],
        positions_T: Tensor,
        cu_seqlens: Tensor,
        embedding_vD: Tensor,
    ) -> list[Tensor]:
        """The features [R, D] of every depth at the rows that need them, as `models.mtp.MtpDraft.chain`.

        Args:
            hidden_t1D: of the policy's last stage.
            embedding_vD: this rank's rows of the embedding.
        """
        if len(rows) > self.num_layers and not self._goes_on:
            raise RunError(
                "MTP layers are not taught to go on from their own guesses with sequence parallelism, "
                "Transformer Engine or an indexer",
                fix=f"set --mtp-training-steps {self.num_layers}",
            )
        attention = UnrolledAttention(local_attention(cu_seqlens, self.spec), cu_seqlens)
        state = hidden_t1D.detach().to(self.mtp.layers[0].eh_proj.weight.dtype)
        features: list[Tensor] = []
        for depth, (following, wanted) in enumerate(zip(tokens, rows, strict=True)):
            if depth < self.num_layers:
                state = self._depth(depth, state, following, positions_T, cu_seqlens, attention, embedding_vD)
                features.append(whole_rows(self.layout, state).index_select(0, wanted))
                continue
            if not wanted.numel():
                features.append(features[-1][:0])
                continue
            state = state.index_select(0, attention.go_on(wanted))
            moved = positions_T[wanted] + (depth - self.num_layers + 1)
            own = torch.tensor([0, len(wanted)], device=wanted.device)
            state = self._depth(
                self.num_layers - 1, state, following[wanted], moved, own, attention, embedding_vD
            )
            features.append(whole_rows(self.layout, state))
        return features

    def _depth(
        self,
        index: int,
        state: Tensor,
        tokens_T: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        attention: UnrolledAttention,
        embedding_vD: Tensor,
    ) -> Tensor:
        rows = packed_rows(tokens_T, positions_T, cu_seqlens, self.layout, self.spec)
        if self._goes_on:
            rows.attention = attention
        assert rows.tokens_1T is not None
        output: Tensor = self.mtp.layers[index]._proj_and_transformer_layer(
            state,
            embedded(embedding_vD, rows.tokens_1T[0], self.layout),
            packed_seq_params=rows,
        )
        return output

    @property
    def _goes_on(self) -> bool:
        """Whether rows of a deeper guess can be attended to: not where rows are cut or padded, nor where an
        indexer would have to choose among several passes.
        """
        whole = self.layout.implementation == "local" and not self.layout.sequence_parallel
        return whole and not self.spec.has_indexer


@torch.no_grad()
def embedded(weight_vD: Tensor, tokens_T: Tensor, layout: MegatronLayout) -> Tensor:
    """Embeddings [t, 1, D] from rows of the vocabulary that are cut over tensor-parallel ranks."""
    if layout.tp == 1:
        return F.embedding(tokens_T, weight_vD).unsqueeze(1)
    rank, size = parallel_state.get_tensor_model_parallel_rank(), weight_vD.shape[0]
    own_T = tokens_T - rank * size
    mine_T = (own_T >= 0) & (own_T < size)
    rows = F.embedding(own_T.masked_fill(~mine_T, 0), weight_vD) * mine_T.unsqueeze(1)
    dist.all_reduce(rows, group=parallel_state.get_tensor_model_parallel_group())
    if layout.sequence_parallel:
        rows = rows.chunk(layout.tp)[rank]
    return rows.unsqueeze(1)
