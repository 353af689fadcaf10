"""The residual streams of Gemma 3n, and what its layers have beside attention and MLP.

See `StreamsSpec`. Coefficients are not bounded, as `altup_coef_clip` bounds them while transformers trains:
it is far above any published one. Shapes: S streams, T tokens, D hidden, L layers, P embedding of a layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miles.arch.spec import ArchSpec
from miles.models.invariant import in_order
from miles.models.norm import rms_norm
from miles.models.numerics import FAST, Numerics

LEAST_SQUARE = 1e-5
"""Lower bound of a mean square that is divided by."""


class Streams(nn.Module):
    """From the embedding to the streams and from them to the final norm.

    layer_embed [Vp, L P]; layer_projection [L P, D] with layer_norm [P]; spread_maps and merge_maps
    [S - 1, D, D], as lists.
    """

    def __init__(self, spec: ArchSpec, dtype: torch.dtype) -> None:
        super().__init__()
        assert spec.streams is not None
        self.numerics: Numerics = FAST
        self.spec, self.eps, self.num_layers = spec.streams, spec.rms_norm_eps, spec.num_layers
        rows, hidden = spec.num_layers * spec.streams.layer_width, spec.hidden_size

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype))

        self.layer_embed = matrix(spec.streams.layer_vocab, rows)
        self.layer_projection = matrix(rows, hidden)
        self.layer_norm = matrix(spec.streams.layer_width)
        others = range(spec.streams.count - 1)
        self.spread_maps = nn.ParameterList(matrix(hidden, hidden) for _ in others)
        self.merge_maps = nn.ParameterList(matrix(hidden, hidden) for _ in others)

    def layer_embeddings(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Of tokens int64 [T], whose embeddings are hidden [T, D]: [T, L, P]."""
        width = self.spec.layer_width
        known = torch.where(tokens < self.spec.layer_vocab, tokens, 0)
        own = F.embedding(known, self.layer_embed) * torch.tensor(width**0.5, dtype=hidden.dtype)
        projected = self.numerics.linear(hidden, self.layer_projection) * hidden.shape[-1] ** -0.5
        projected = rms_norm(projected.view(len(tokens), self.num_layers, width), self.layer_norm, self.eps)
        return (projected + own.view(projected.shape)) * 2**-0.5

    def spread(self, hidden: Tensor) -> Tensor:
        """[T, D] -> [S, T, D], all of the first one's magnitude."""
        size = _magnitude(hidden)
        others = [_resized(self.numerics.linear(hidden, weight), size) for weight in self.spread_maps]
        return torch.stack([hidden, *others])

    def merged(self, streams: Tensor) -> Tensor:
        """[S, T, D] -> [T, D], the mean."""
        first, *others = streams.unbind()
        size = _magnitude(first)
        maps = zip(others, self.merge_maps, strict=True)
        resized = (_resized(self.numerics.linear(x, weight), size) for x, weight in maps)
        return (in_order(x.float() for x in (first, *resized)) / len(streams)).to(streams.dtype)


def _magnitude(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _resized(x: Tensor, size: Tensor) -> Tensor:
    return x * size / x.square().mean(-1, keepdim=True).clamp(min=LEAST_SQUARE).sqrt()


class LayerAddition(nn.Module):
    """What one layer has beside its blocks: AltUp (router_norm, output_scale [D], router [S, D], predict
    [S S, S], correct [S, S]), LAuReL (laurel_down [r, D], laurel_up [D, r], laurel_norm [D]), and the
    embedding of the layer (embed_gate [P, D], embed_up [D, P], embed_norm [D]).
    """

    def __init__(self, spec: ArchSpec, dtype: torch.dtype) -> None:
        super().__init__()
        assert spec.streams is not None
        self.numerics: Numerics = FAST
        self.eps, self.count = spec.rms_norm_eps, spec.streams.count
        hidden, rank, width = spec.hidden_size, spec.streams.laurel_rank, spec.streams.layer_width
        shapes = {
            "router_norm": (hidden,),
            "router": (self.count, hidden),
            "predict": (self.count**2, self.count),
            "correct": (self.count, self.count),
            "output_scale": (hidden,),
            "laurel_down": (rank, hidden),
            "laurel_up": (hidden, rank),
            "laurel_norm": (hidden,),
            "embed_gate": (width, hidden),
            "embed_up": (hidden, width),
            "embed_norm": (hidden,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))

    def _modalities(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, S], between -1 and 1."""
        normed = rms_norm(x, self.router_norm, self.eps) / x.shape[-1]
        routed = self.numerics.linear(normed, self.router)
        return torch.tanh(routed.float()).to(x.dtype)

    def predicted(self, streams: Tensor) -> Tensor:
        """[S, T, D] -> [S, T, D]: each stream with a mixture of all added."""
        coefficients = self.numerics.linear(self._modalities(streams[0]), self.predict)
        return streams + self.numerics.mixtures(coefficients.unflatten(-1, (self.count, -1)), streams)

    def low_rank(self, x: Tensor) -> Tensor:
        """LAuReL of x [T, D]."""
        linear = self.numerics.linear
        return x + rms_norm(linear(linear(x, self.laurel_down), self.laurel_up), self.laurel_norm, self.eps)

    def corrected(self, predicted: Tensor, computed: Tensor, embedding: Tensor) -> Tensor:
        """predicted [S, T, D] after the layer computed [T, D] for the first stream; embedding [T, P]."""
        numerics = self.numerics
        coefficients = numerics.linear(self._modalities(computed), self.correct) + 1
        streams = predicted + coefficients.t().unsqueeze(-1) * (computed - predicted[0])
        gate = numerics.gelu(numerics.linear(streams[0] * self.output_scale, self.embed_gate))
        added = rms_norm(numerics.linear(gate * embedding, self.embed_up), self.embed_norm, self.eps)
        return torch.cat([streams[:1], streams[1:] + added])
