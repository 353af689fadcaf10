"""Multi-token-prediction layers: a small model that reads the trunk's hidden states and guesses ahead.

Row t of depth 0 reads the trunk's final-norm hidden state of token t and the embedding of token t + 1, and
predicts token t + 2. Depth k reads the features of depth k - 1 at row t and token t + 1 + k, and predicts
token t + 2 + k (https://arxiv.org/abs/2412.19437, section 2.2). Embedding and head are the trunk's, and never
get a gradient from here. Experts are decided, never replayed: routes of a rollout are those of the trunk.

As the engine's draft, with one cache for all requests:

>>> cache = KVCache(draft.arch, num_slots, numerics.cache_length(max_len))  # row t of a request in column t
>>> draft(hidden, next_tokens, positions, attention, trunk)                 # rows that the trunk has read
>>> features = draft(features, guesses, positions + 1, attention, trunk, depth=1)  # its own guess, one deeper
>>> logits = draft.logits(features, trunk)

- *Rows the trunk has read* (a prompt but for its last token, later the accepted tokens): row t takes
  hidden[t], token t + 1 and position t. `packed_attention(cu_seqlens, cache, slots)` writes a prompt,
  `cached_attention` (or a tree) one row more. The last row's features give the logits of the first guess.
- *Guessing deeper*: features go back in with the guessed token, `depth` counts up; beyond the last layer that
  layer is used again, and only then does the position move on: `position_of(row, depth)`. Those rows hold
  guessed features: write the true ones over them once the trunk has read the tokens.
- With several layers each has its own layer of the cache, to be kept up in the same way: the row of depth k
  needs the features of depth k - 1 at the same row, so it lags k tokens behind.

Shapes: T rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles.arch.spec import ArchSpec
from miles.models.attention import Attention
from miles.models.decoder import Decoder, DecoderLayer
from miles.models.norm import rms_norm
from miles.models.numerics import FAST, Numerics
from miles.models.routing import Router
from miles.models.unrolled_attention import UnrolledAttention


def draft_arch(spec: ArchSpec) -> ArchSpec:
    """The MTP layers of a model seen as a decoder: what sizes their cache and their layers."""
    assert spec.mtp is not None, "a model without MTP layers"
    return replace(spec, layers=spec.mtp.layers, mtp=None)


class MtpProjection(nn.Module):
    """fc [D, 2D] over the normed embedding and the normed hidden state, in this order; final_norm [D]."""

    def __init__(self, spec: ArchSpec, dtype: torch.dtype) -> None:
        super().__init__()
        width = spec.hidden_size
        self.embedding_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        self.hidden_norm = nn.Parameter(torch.empty(width, dtype=dtype))
        self.fc = nn.Parameter(torch.empty(width, 2 * width, dtype=dtype))
        self.final_norm = nn.Parameter(torch.empty(width, dtype=dtype))


class MtpDraft(nn.Module):
    """The MTP layers of `spec`. Weights are uninitialised until `init_weights` or a checkpoint is loaded.

    Implements `eagle.DraftModel`. `arch`: its layers as a decoder's, for a KVCache.
    """

    taps = ()

    def __init__(self, spec: ArchSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.arch = draft_arch(spec)
        assert spec.mtp is not None
        self.spec, self.eps = spec, spec.rms_norm_eps
        self.numerics: Numerics = FAST
        self.projections = nn.ModuleList(MtpProjection(spec, dtype) for _ in range(spec.mtp.num_projections))
        self.layers = nn.ModuleList(DecoderLayer(self.arch, i, dtype) for i in range(len(self.arch.layers)))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def use_numerics(self, numerics: Numerics) -> None:
        """Compute like this from now on."""
        for module in self.modules():
            if hasattr(module, "numerics"):
                module.numerics = numerics

    def position_of(self, row: Tensor, depth: int) -> Tensor:
        """The position at which depth `depth` stands when it guesses on from `row` (int64 [T])."""
        return row + max(0, depth - self.num_layers + 1)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        trunk: Decoder,
        depth: int = 0,
        router: Router | None = None,
    ) -> Tensor:
        """One depth: the features [T, D] that predict the token after `tokens`.

        Args:
            hidden: [T, D], the trunk's final-norm hidden states for depth 0, the features of the depth
                before otherwise.
            tokens: int64 [T], the token that follows the one `hidden` stands for.
            positions: int64 [T].
            router: for MoE layers; by default one that decides.
        """
        index = min(depth, self.num_layers - 1)
        projection = self.projections[min(index, len(self.projections) - 1)]
        embedded = rms_norm(F.embedding(tokens, trunk.embed.detach()), projection.embedding_norm, self.eps)
        normed = rms_norm(hidden, projection.hidden_norm, self.eps)
        mixed = self.numerics.linear(torch.cat((embedded, normed), -1), projection.fc)
        rotation = self.numerics.rotations(
            self.arch.layers[index].attention, self.arch.max_position_embeddings, positions
        )
        out = self.layers[index](mixed, rotation, attention, router or Router.decide())
        return rms_norm(out, projection.final_norm, self.eps)

    def chain(
        self,
        hidden: Tensor,
        tokens: Sequence[Tensor],
        rows: Sequence[Tensor],
        positions: Tensor,
        attention: UnrolledAttention,
        trunk: Decoder,
    ) -> list[Tensor]:
        """The features of every depth at the rows that need them, over whole sequences, for training. Depths
        beyond the last layer go through that layer again, as guesses do in the engine.

        Args:
            hidden: the trunk's [T, D]; no gradient goes back into it.
            tokens: per depth k int64 [T], token t + 1 + k at row t (any token where the sequence has ended:
                no earlier row sees it).
            rows: per depth int64 [R], ascending, each among those of the depth before; may be empty.

        Returns:
            Per depth [R, D].
        """
        features: list[Tensor] = []
        state = hidden.detach()
        for depth, (following, wanted) in enumerate(zip(tokens, rows, strict=True)):
            if depth < self.num_layers:
                state = self(state, following, positions, attention, trunk, depth)
                features.append(state.index_select(0, wanted))
                continue
            if not wanted.numel():
                features.append(state[:0])
                continue
            state = state.index_select(0, attention.go_on(wanted))
            moved = self.position_of(positions[wanted], depth)
            state = self(state, following[wanted], moved, attention, trunk, depth)
            features.append(state)
        return features

    def logits(self, features: Tensor, trunk: Decoder) -> Tensor:
        """[T, D] -> [T, V]."""
        return self.numerics.linear(features, trunk.head_weight.detach())

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices ~ N(0, initializer_range²), norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=self.spec.initializer_range, generator=generator)
