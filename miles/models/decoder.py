"""The native decoder: one class for the trainer and the engine, driven by ArchSpec, over flat tokens.

>>> decoder = Decoder(spec); decoder.init_weights(torch.Generator().manual_seed(0))
>>> hidden = decoder(tokens, positions, PackedAttention(cu_seqlens), Router.decide())
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles.arch.spec import ArchSpec, AttentionSpec, LayerSpec, MoeSpec, QueryTemperature, RopeSpec
from miles.models.attention import Attention, has_head_attention
from miles.models.latent_attention import LatentAttentionBlock
from miles.models.mlp import DenseMlp, MoeMlp
from miles.models.norm import rms_norm
from miles.models.numerics import FAST, Numerics
from miles.models.projections import Projections
from miles.models.recompute import RecomputedModule, again, once
from miles.models.routing import Router
from miles.models.shared_keys import SharedKeys
from miles.models.softcap import softcapped
from miles.models.streams import LayerAddition, Streams


class AttentionBlock(Projections):
    """Fused projection qkv [(H + 2 Hkv) d, D] (queries, keys, values), norms of queries and keys where the
    model has them ([d] over heads, [H d] and [Hkv d] over the width), output o [D, H d]. `input_size`: what
    qkv reads, where that is not D.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        hidden_size: int,
        eps: float,
        dtype: torch.dtype,
        input_size: int | None = None,
        norm_plus_one: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.eps, self.norm_plus_one = spec, eps, norm_plus_one
        self.recompute_modules: frozenset[RecomputedModule] = frozenset()
        self.qkv = nn.Parameter(torch.empty(spec.qkv_width, input_size or hidden_size, dtype=dtype))
        self.qkv_bias = nn.Parameter(torch.empty(spec.qkv_width, dtype=dtype)) if spec.qkv_bias else None
        self.q_norm = nn.Parameter(torch.empty(spec.q_norm_width, dtype=dtype)) if spec.qk_norm else None
        has_k_norm = spec.qk_norm and spec.keys_of is None
        self.k_norm = nn.Parameter(torch.empty(spec.k_norm_width, dtype=dtype)) if has_k_norm else None
        self.o = nn.Parameter(torch.empty(hidden_size, spec.query_width, dtype=dtype))
        self.o_bias = nn.Parameter(torch.empty(hidden_size, dtype=dtype)) if spec.output_bias else None

    def forward(self, x: Tensor, rotation: Tensor, attention: Attention, layer: int) -> Tensor:
        """x [T, D] -> [T, D]. `rotation`: as `numerics.rotations` gives it; where the layer does not rotate,
        what queries are multiplied with, fp32 [T]."""
        spec, numerics = self.spec, self.numerics
        heads = self.project("qkv", x, self.qkv_bias).view(x.shape[0], -1, spec.head_dim)
        run = again if "core_attn" in self.recompute_modules else once
        if has_head_attention(attention) and attention.takes(heads, spec, self.norm_plus_one):
            norms = (self.q_norm, self.k_norm)
            attended = run(attention.attend_heads, heads, *norms, rotation, self.eps, spec)
            return self.project("o", attended, self.o_bias)
        own = spec.own_kv_heads
        qk, v = heads.split_with_sizes((spec.num_heads + own, own), 1)
        if self.q_norm is not None:
            qk = self._normed(qk, self.q_norm, self.k_norm)
        if spec.v_unit and own:
            v = rms_norm(v, v.new_ones(spec.head_dim), self.eps)
        if spec.rotates:
            qk = numerics.rotate(_pairs_apart(qk) if spec.rope.interleaved else qk, rotation)
        if spec.qk_unit:
            qk = rms_norm(qk, qk.new_ones(spec.head_dim), self.eps)
        q, k = qk.split_with_sizes((spec.num_heads, own), 1)
        if not spec.rotates:
            q = (q * rotation[:, None, None]).to(q.dtype)
        if spec.query_factor != 1.0:
            q = q * spec.query_factor
        q, k, v = (numerics.attention_input(part) for part in (q, k, v))
        attended = run(attention.attend, layer, q, k, v, spec).to(x.dtype)
        return self.project("o", attended, self.o_bias)

    def _normed(self, qk: Tensor, q_norm: Tensor, k_norm: Tensor | None) -> Tensor:
        """Queries and keys [T, H + Hkv, d] under their norms; without keys of its own [T, H, d]."""
        spec = self.spec
        if k_norm is None:
            return rms_norm(qk, q_norm, self.eps, self.norm_plus_one)
        if spec.qk_norm_over == "head":
            norms = (q_norm.expand(spec.num_heads, -1), k_norm.expand(spec.num_kv_heads, -1))
            return rms_norm(qk, torch.cat(norms), self.eps, self.norm_plus_one)
        q, k = qk.flatten(1).split_with_sizes((spec.query_width, spec.kv_width), 1)
        both = (
            rms_norm(q, q_norm, self.eps, self.norm_plus_one),
            rms_norm(k, k_norm, self.eps, self.norm_plus_one),
        )
        return torch.cat(both, 1).view(qk.shape)


def _pairs_apart(heads: Tensor) -> Tensor:
    """Elements 2 i and 2 i + 1 of [T, H, d] go to i and i + d / 2, where rotations expect a pair."""
    return heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class DecoderLayer(nn.Module):
    def __init__(self, spec: ArchSpec, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        layer: LayerSpec = spec.layers[index]
        self.index, self.eps, self.norm_plus_one = index, spec.rms_norm_eps, spec.norm_plus_one
        self.numerics: Numerics = FAST
        self.recompute_modules: frozenset[RecomputedModule] = frozenset()

        def norm() -> nn.Parameter:
            return nn.Parameter(torch.empty(spec.hidden_size, dtype=dtype))

        self.input_norm = norm()
        self.attention: AttentionBlock | LatentAttentionBlock
        if layer.attention.latent is None:
            self.attention = AttentionBlock(
                layer.attention, spec.hidden_size, self.eps, dtype, norm_plus_one=spec.norm_plus_one
            )
        else:
            self.attention = LatentAttentionBlock(layer.attention, spec.hidden_size, dtype)
        self.attention_output_norm = norm() if layer.output_norms else None
        self.post_norm = norm()
        self.mlp: DenseMlp | MoeMlp
        if isinstance(layer.mlp, MoeSpec):
            self.mlp = MoeMlp(layer.mlp, spec.hidden_size, spec.moe_layers.index(index), dtype)
        else:
            self.mlp = DenseMlp(layer.mlp, spec.hidden_size, dtype)
        self.mlp_output_norm = norm() if layer.output_norms else None

    def forward(self, hidden: Tensor, rotation: Tensor, attention: Attention, router: Router) -> Tensor:
        attended = self.attention(self._norm(hidden, self.input_norm), rotation, attention, self.index)
        hidden = hidden + self._norm(attended, self.attention_output_norm)
        kind: RecomputedModule = "moe" if isinstance(self.mlp, MoeMlp) else "mlp"
        run = again if kind in self.recompute_modules else once
        return hidden + run(self._normed_mlp, hidden, router)

    def _normed_mlp(self, hidden: Tensor, router: Router) -> Tensor:
        return self._norm(self.mlp(self._norm(hidden, self.post_norm), router), self.mlp_output_norm)

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """x itself where the layer has no such norm."""
        if weight is None:
            return x
        return self.numerics.rms_norm(x, weight, self.eps, self.norm_plus_one)


class StreamLayer(DecoderLayer):
    """A layer over several residual streams: it computes the first and corrects the others by it, see
    `StreamsSpec`.
    """

    def __init__(self, spec: ArchSpec, index: int, dtype: torch.dtype) -> None:
        super().__init__(spec, index, dtype)
        self.addition = LayerAddition(spec, dtype)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, rotation: Tensor, attention: Attention, router: Router, embedding: Tensor
    ) -> Tensor:
        """hidden [S, T, D], embedding of this layer [T, P] -> [S, T, D]."""
        predicted = self.addition.predicted(hidden)
        first = predicted[0]
        normed = self._norm(first, self.input_norm)
        attended = self.attention(normed, rotation, attention, self.index)
        summed = first + self._norm(attended, self.attention_output_norm)
        summed = (summed + self.addition.low_rank(normed)) / 2**0.5
        run = again if "mlp" in self.recompute_modules else once
        return self.addition.corrected(predicted, summed + run(self._normed_mlp, summed, router), embedding)


class Taps:
    """What flows into some layers of one forward. Layers count from 0; their number means behind the last."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._seen: dict[int, Tensor] = {}

    def see(self, layer: int, hidden: Tensor) -> None:
        if layer in self._layers:
            self._seen[layer] = hidden

    def joined(self) -> Tensor:
        """[T, len(layers) * D], in the order of `layers`."""
        return torch.cat([self._seen[layer] for layer in self._layers], -1)


class Decoder(nn.Module):
    """A decoder-only model. Weights are uninitialised until `init_weights` or `weights.load_published`.

    `spec`: MTP layers are a module of their own (`mtp`), and `self.spec` goes without them.
    `recompute_num_layers`: the first so many layers keep only their input for backward and run again there.
    `numerics`: how everything is computed, see `use_numerics`; attention objects come from it.
    """

    def __init__(self, spec: ArchSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec.policy
        self.recompute_num_layers = 0
        self.numerics: Numerics = FAST
        self.embed = nn.Parameter(torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype))
        layer_class = DecoderLayer if spec.streams is None else StreamLayer
        self.layers = nn.ModuleList(layer_class(spec, i, dtype) for i in range(spec.num_layers))
        self.streams = None if spec.streams is None else Streams(spec, dtype)
        self.final_norm = nn.Parameter(torch.empty(spec.hidden_size, dtype=dtype))
        head = torch.empty(0 if spec.tie_word_embeddings else spec.head_rows, spec.hidden_size, dtype=dtype)
        self.head = None if spec.tie_word_embeddings else nn.Parameter(head)

    def recompute(self, modules: frozenset[RecomputedModule]) -> None:
        """Run these parts of every layer again in backward from now on; what they made is not kept."""
        for module in self.modules():
            if hasattr(module, "recompute_modules"):
                module.recompute_modules = modules

    def use_numerics(self, numerics: Numerics) -> None:
        """Compute like this from now on."""
        for module in self.modules():
            if hasattr(module, "numerics"):
                module.numerics = numerics

    @property
    def head_weight(self) -> Tensor:
        """[V, D], a critic's [1, D]; the embedding itself when tied."""
        return self.embed if self.head is None else self.head

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        router: Router,
        taps: Taps | None = None,
    ) -> Tensor:
        """Final-norm hidden states [T, D] of flat tokens and positions (int64 [T])."""
        hidden = self._embedded(tokens)
        rotations = self._rotations(positions)
        if self.spec.shares_keys:
            attention = SharedKeys(attention)
        added: Sequence[tuple[Tensor, ...]] = [()] * len(self.layers)
        if self.streams is not None:
            added = [(rows,) for rows in self.streams.layer_embeddings(tokens, hidden).unbind(1)]
            hidden = self.streams.spread(hidden)
        for index, layer in enumerate(self.layers):
            rotation = rotations[_positional(self.spec.layers[index].attention)]
            if taps is not None:
                taps.see(index, hidden)
            run = again if index < self.recompute_num_layers else once
            hidden = run(layer, hidden, rotation, attention, router, *added[index])
        if self.streams is not None:
            hidden = self.streams.merged(hidden)
        if taps is not None:
            taps.see(len(self.layers), hidden)
        return self.numerics.rms_norm(
            hidden, self.final_norm, self.spec.rms_norm_eps, self.spec.norm_plus_one
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return softcapped(self.numerics.linear(hidden, self.head_weight), self.spec.logit_softcap)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices ~ N(0, initializer_range²), biases 0; norms change nothing."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm"):
                parameter.fill_(0.0 if self.spec.norm_plus_one else 1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=self.spec.initializer_range, generator=generator)

    def _embedded(self, tokens: Tensor) -> Tensor:
        hidden = F.embedding(tokens, self.embed)
        scale = self.spec.embedding_scale
        # The factor has the embedding's precision, as where the weights were trained.
        return hidden if scale == 1.0 else hidden * torch.tensor(scale, dtype=hidden.dtype)

    def _rotations(self, positions: Tensor) -> dict[Positional, Tensor]:
        """What the layers' attention takes as `rotation`, for each kind of them."""
        kinds = {_positional(layer.attention): layer.attention for layer in self.spec.layers}
        most, numerics = self.spec.max_position_embeddings, self.numerics
        return {
            kind: numerics.rotations(spec, most, positions)
            if spec.rotates
            else query_factors(spec.temperature, positions)
            for kind, spec in kinds.items()
        }


Positional = RopeSpec | QueryTemperature | None
"""What of a layer depends on positions."""


def _positional(spec: AttentionSpec) -> Positional:
    return spec.rope if spec.rotates else spec.temperature


def query_factors(temperature: QueryTemperature | None, positions: Tensor) -> Tensor:
    """fp32 [T], see `QueryTemperature`."""
    if temperature is None:
        return torch.ones(positions.shape, device=positions.device)
    steps = torch.floor((positions.float() + 1) / temperature.floor)
    # In fp64: where the last bit of a logarithm depends on the other positions, the rounded factor does not.
    return (torch.log1p(steps.double()) * temperature.scale + 1).float()
