"""EAGLE and EAGLE-3 drafts: one Llama layer that reads what the trunk computed, and guesses ahead on its own.

They are used as MTP layers are (`mtp`): row t takes what the trunk has of token t and the embedding of token
t + 1, gives features, and from them the logits of token t + 2; going deeper, features go back in. Formulas as
in SGLang's `llama_eagle.py` and `llama_eagle3.py`. They come from checkpoints and are not trained here.

Shapes: T rows, D hidden, V vocabulary, K layers tapped, Vd vocabulary of the draft's own head.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles.arch.draft_checkpoint import DraftCheckpoint
from miles.arch.spec import ArchSpec, DenseMlpSpec
from miles.models.attention import Attention
from miles.models.decoder import AttentionBlock, Decoder
from miles.models.mlp import DenseMlp
from miles.models.norm import rms_norm
from miles.models.numerics import FAST, Numerics
from miles.models.routing import Router


class DraftModel(Protocol):
    """What the engine guesses with: MTP layers, or one of the classes here."""

    arch: ArchSpec
    """Its layers as a decoder's, for a KVCache."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the trunk whose inputs (`decoder.Taps`) it reads instead of the final hidden state."""
        ...

    def use_numerics(self, numerics: Numerics) -> None: ...

    def __call__(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        trunk: Decoder,
        depth: int = 0,
    ) -> Tensor:
        """Features [T, D], see `mtp.MtpDraft.forward`; with taps, `hidden` is [T, K * D] at depth 0."""
        ...

    def logits(self, features: Tensor, trunk: Decoder) -> Tensor:
        """[T, D] -> [T, V]; -inf for tokens that the draft cannot say."""
        ...


class _EagleBase(nn.Module):
    """What both have: fc, a layer, and an embedding of their own where the checkpoint has one."""

    def __init__(self, draft: DraftCheckpoint, fused: int, attended: int, dtype: torch.dtype) -> None:
        super().__init__()
        arch = draft.model
        width, layer = arch.hidden_size, arch.layers[0]
        assert isinstance(layer.mlp, DenseMlpSpec)
        self.arch, self.eps, self.taps = arch, arch.rms_norm_eps, draft.taps
        self.numerics: Numerics = FAST
        self.fc = nn.Parameter(torch.empty(width, fused * width, dtype=dtype))
        self.fc_bias = nn.Parameter(torch.empty(width, dtype=dtype)) if draft.fc_bias else None
        embedding = torch.empty(arch.vocab_size if draft.own_embedding else 0, width, dtype=dtype)
        self.embed = nn.Parameter(embedding) if draft.own_embedding else None
        self.attention = AttentionBlock(layer.attention, width, self.eps, dtype, attended * width)
        self.post_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        self.mlp = DenseMlp(layer.mlp, width, dtype)

    def use_numerics(self, numerics: Numerics) -> None:
        """Compute like this from now on."""
        for module in self.modules():
            if hasattr(module, "numerics"):
                module.numerics = numerics

    def _embedded(self, tokens: Tensor, trunk: Decoder) -> Tensor:
        return F.embedding(tokens, trunk.embed if self.embed is None else self.embed)

    def _layer(self, attended: Tensor, residual: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        spec = self.arch.layers[0].attention
        rotation = self.numerics.rotations(spec, self.arch.max_position_embeddings, positions)
        hidden = residual + self.attention(attended, rotation, attention, 0)
        return hidden + self.mlp(rms_norm(hidden, self.post_norm, self.eps), Router.decide())


class EagleDraft(_EagleBase):
    """EAGLE: its features imitate the trunk's final hidden states, so the trunk's head reads them."""

    def __init__(self, draft: DraftCheckpoint, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(draft, fused=2, attended=1, dtype=dtype)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        trunk: Decoder,
        depth: int = 0,
    ) -> Tensor:
        mixed = torch.cat((self._embedded(tokens, trunk), hidden), -1)
        mixed = self.numerics.linear(mixed, self.fc, self.fc_bias)
        return self._layer(mixed, mixed, positions, attention)

    def logits(self, features: Tensor, trunk: Decoder) -> Tensor:
        return self.numerics.linear(features, trunk.head_weight)


class Eagle3Draft(_EagleBase):
    """EAGLE-3: fc joins the tapped states once; own head over some of the tokens, `token_ids` int64 [Vd]."""

    token_ids: Tensor

    def __init__(self, draft: DraftCheckpoint, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(draft, fused=len(draft.taps), attended=2, dtype=dtype)
        width = self.arch.hidden_size
        self.input_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        self.hidden_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        self.final_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        self.head = nn.Parameter(torch.empty(draft.draft_vocab_size, width, dtype=dtype))
        self.register_buffer("token_ids", torch.zeros(draft.draft_vocab_size, dtype=torch.int64))

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        trunk: Decoder,
        depth: int = 0,
    ) -> Tensor:
        if depth == 0:
            hidden = self.numerics.linear(hidden, self.fc, self.fc_bias)
        embedded = rms_norm(self._embedded(tokens, trunk), self.input_norm, self.eps)
        attended = torch.cat((embedded, rms_norm(hidden, self.hidden_norm, self.eps)), -1)
        return self._layer(attended, hidden, positions, attention)

    def logits(self, features: Tensor, trunk: Decoder) -> Tensor:
        own = self.numerics.linear(rms_norm(features, self.final_norm, self.eps), self.head)
        everything = own.new_full((len(own), self.arch.vocab_size), float("-inf"))
        return everything.index_copy_(1, self.token_ids, own)
