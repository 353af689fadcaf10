"""A model in the few numbers that memory arithmetic needs, taken from its ArchSpec once."""

from __future__ import annotations

from dataclasses import dataclass

from miles.arch import ArchSpec, LayerSpec, MoeSpec
from miles.planning.formats import EXPERTS_ONLY, PLAIN_BYTES, QUANTISED, Format, bytes_per_weight


@dataclass(frozen=True)
class ModelShape:
    """Parameters by how they are cut and quantised, and the widths of a layer.

    Counts are of the whole model. `query` holds the query and output projections, `small` the norms and
    biases, which every rank holds whole. `attention_width` and `mlp_width` are numbers kept per token for
    backward in the widest layer. `dense_mlp` includes shared experts.
    """

    num_layers: int
    num_moe_layers: int
    top_k: int
    hidden_size: int
    vocab_size: int
    num_kv_heads: int
    cache_width: int
    """Numbers that a layer's cache holds of a token, all heads together."""
    attention_width: int
    mlp_width: int
    embedding: int
    head: int
    """0 where it is tied to the embedding."""
    query: int
    key_value: int
    dense_mlp: int
    router: int
    experts: int
    small: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.linear + self.router + self.small

    @property
    def linear(self) -> int:
        """Weights of the matrix products inside the layers, the router's aside."""
        return self.query + self.key_value + self.dense_mlp + self.experts

    def quantised(self, weight_format: Format) -> int:
        """Weights that a format applies to: those of the matrix products, or of the experts alone."""
        if weight_format not in QUANTISED:
            return 0
        return self.experts if weight_format in EXPERTS_ONLY and self.experts else self.linear

    def stored_bytes(self, weight_format: Format, plain: Format = "bf16", int4_group_size: int = 32) -> int:
        """Bytes of all weights: matrix products in `weight_format`, the others in `plain`."""
        if weight_format not in QUANTISED:
            return self.total * PLAIN_BYTES[weight_format]
        quantised = self.quantised(weight_format)
        rest = (self.total - quantised) * PLAIN_BYTES[plain]
        return int(quantised * bytes_per_weight(weight_format, int4_group_size)) + rest


def model_shape(spec: ArchSpec) -> ModelShape:
    """The shape of a model; its parameters add up to `spec.num_parameters()`."""
    width, table = spec.hidden_size, spec.vocab_size * spec.hidden_size
    query = key_value = dense_mlp = router = experts = 0
    for layer in spec.layers:
        query += layer.attention.query_parameters(width)
        key_value += layer.attention.key_value_parameters(width)
        if isinstance(layer.mlp, MoeSpec):
            router += layer.mlp.num_experts * width
            experts += layer.mlp.num_experts * 3 * width * layer.mlp.intermediate_size
            dense_mlp += layer.mlp.shared_parameters(width)
        else:
            dense_mlp += layer.mlp.num_parameters(width)
    head = 0 if spec.tie_word_embeddings else spec.head_rows * width
    if spec.streams is not None:
        table += spec.streams.table_parameters(spec.num_layers)
    known = table + head + query + key_value + dense_mlp + router + experts
    attention = spec.layers[0].attention
    return ModelShape(
        num_layers=spec.num_layers,
        num_moe_layers=len(spec.moe_layers),
        top_k=spec.top_k,
        hidden_size=width,
        vocab_size=spec.vocab_size,
        num_kv_heads=attention.num_kv_heads,
        cache_width=attention.cache_width,
        attention_width=max(layer.attention.kept_width for layer in spec.layers),
        mlp_width=max(_mlp_width(layer, width) for layer in spec.layers),
        embedding=table,
        head=head,
        query=query,
        key_value=key_value,
        dense_mlp=dense_mlp,
        router=router,
        experts=experts,
        small=spec.num_parameters() - known,
    )


def _mlp_width(layer: LayerSpec, hidden_size: int) -> int:
    if isinstance(layer.mlp, MoeSpec):
        routed = layer.mlp.top_k * (3 * layer.mlp.intermediate_size + 2 * hidden_size)
        return routed + 3 * layer.mlp.shared_size
    return 3 * layer.mlp.intermediate_size
