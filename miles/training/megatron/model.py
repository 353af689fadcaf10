"""The model of a Megatron trainer: this rank's chunks of a GPTModel whose head is left to the loss."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from miles.arch.spec import ArchSpec
from miles.training.megatron.attention import PackedRows
from miles.training.megatron.layer_specs import layer_specs
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.routes import RouteBook


class ValueHead(nn.Module):
    """A critic's head, weight [1, D]. One row cannot be cut: every tensor-parallel rank has it whole, and
    with sequence parallelism applies it to its own rows, so that its gradients are summed over the ranks.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel


class PolicyModel(GPTModel):
    """One pipeline stage. It ends with final hidden states: only trained rows pass the head (`head`), which
    is that of a language model or, by the spec, of a critic (`values`).
    """

    def __init__(self, spec: ArchSpec, layout: MegatronLayout, **options: Any) -> None:
        super().__init__(**options)
        self.spec = spec
        self.valid_vocab = spec.vocab_size
        self.routes = RouteBook(self.decoder, spec.moe)
        for buffer in (self.embedding.word_embeddings.weight,) if self.pre_process else ():
            buffer.data[:] = 0  # the rows that pad the vocabulary
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.data[:] = 0
        if self.post_process and spec.value_head:
            self.add_module("output_layer", ValueHead(self.config))

    def forward(self, rows: PackedRows) -> Tensor:
        """Hidden states [t, 1, D] of this stage; t is T, or this rank's share with sequence parallelism."""
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=rows.tokens_1T, position_ids=rows.positions_1T)
            if self.spec.embedding_scale != 1.0:
                # The factor has the embedding's precision, as where the weights were trained.
                hidden = hidden * torch.tensor(self.spec.embedding_scale, dtype=hidden.dtype)
        output: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=rows)
        return output

    @property
    def head_weight(self) -> Tensor:
        """[V / tp, D]: this rank's rows of the head; a critic's is [1, D] on every rank."""
        weight = self.shared_embedding_or_output_weight() if self._tied else self.output_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _tied(self) -> bool:
        return bool(self.share_embeddings_and_output_weights)


def build_chunks(
    spec: ArchSpec, layout: MegatronLayout, config: TransformerConfig, device: torch.device
) -> list[PolicyModel]:
    """The chunks of this rank: one, or several where the pipeline is interleaved."""
    stages = layout.virtual_stages(spec.num_layers)
    return [
        _build(spec, layout, config, None if stages is None else stage).to(device)
        for stage in range(stages or 1)
    ]


def _build(
    spec: ArchSpec, layout: MegatronLayout, config: TransformerConfig, vp_stage: int | None
) -> PolicyModel:
    return PolicyModel(
        spec,
        layout,
        config=config,
        transformer_layer_spec=layer_specs(spec, layout, config, vp_stage),
        vocab_size=layout.padded_vocab_size(spec.vocab_size),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tie_word_embeddings,
        position_embedding_type="none",
        vp_stage=vp_stage,
    )


def keep_biases_in_fp32(module: nn.Module) -> None:
    """Router biases are compared, not multiplied: after a change of a module's format, undo theirs."""
    for part in module.modules():
        if isinstance(part, TopKRouter):
            part._maintain_float32_expert_bias()
