"""What one trainer GPU holds, by arithmetic over the ArchSpec and the layout.

Activations follow Korthikanti et al. (https://arxiv.org/abs/2205.05198) for SwiGLU, grouped-query attention
with a flash kernel, and top-k experts with balanced routing. An estimate: each part has its formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from miles.planning.formats import PLAIN_BYTES, Format
from miles.planning.layout import Layout
from miles.planning.memory import ADAM_BYTES, MASTER_BYTES, MemoryPart
from miles.planning.model_shape import ModelShape

FP8_COPIES = 2
"""Transformer Engine keeps each FP8 weight twice, as it is and transposed, one byte each."""


@dataclass(frozen=True)
class TrainerNumerics:
    """What decides the bytes of a trainer, besides model and layout."""

    dtype: Format
    fp8: bool = False
    int4_qat: bool = False
    fp8_param_gather: bool = False
    fp32_gradients: bool = True
    distributed_optimizer: bool = True
    optimizer_on_host: bool = False
    recompute: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int = 1
    log_probs_chunk_tokens: int | None = None


@dataclass(frozen=True)
class RankWeights:
    """Parameters on one rank: those that every data-parallel rank holds, and experts."""

    dense: int
    experts: int
    quantised: int
    """Of both, the weights of matrix products."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


def rank_weights(model: ModelShape, layout: Layout, stage: int) -> RankWeights:
    """Parameters of one rank of a pipeline stage. Key-value heads are repeated where TP exceeds them."""
    share = layout.stages(model.num_layers)[stage] / model.num_layers
    key_value = model.key_value / min(layout.tp, model.num_kv_heads)
    linear = share * ((model.query + model.dense_mlp) / layout.tp + key_value)
    whole = share * (model.router + model.small)
    tables = (model.embedding if stage == 0 else 0) + _head(model, layout, stage)
    experts = share * model.experts / (layout.ep * layout.etp)
    return RankWeights(int(linear + whole + tables / layout.tp), int(experts), int(linear + experts))


def _head(model: ModelShape, layout: Layout, stage: int) -> int:
    """A tied head is a second copy of the embedding where it is on another stage."""
    if stage != layout.pp - 1:
        return 0
    return model.head or (model.embedding if layout.pp > 1 else 0)


def state_parts(weights: RankWeights, layout: Layout, numerics: TrainerNumerics) -> list[MemoryPart]:
    """Weights, gradients and optimizer of one rank."""
    n, width = weights.total, PLAIN_BYTES[numerics.dtype]
    gradient = 4 if numerics.fp32_gradients else width
    saved = weights.quantised * (width - 1) if numerics.fp8_param_gather else 0
    less = f" - {weights.quantised:,} × {width - 1} B held in FP8" if saved else ""
    parts = [MemoryPart("weights", n * width - saved, f"{n:,} parameters × {width} B{less}")]
    if numerics.fp8:
        copies = FP8_COPIES - numerics.fp8_param_gather
        parts.append(
            MemoryPart(
                "FP8 weights", weights.quantised * copies, f"{weights.quantised:,} × {copies} B (TE copies)"
            )
        )
    parts.append(MemoryPart("gradients", n * gradient, f"{n:,} × {gradient} B"))
    parts.append(_optimizer(weights, layout, numerics))
    return parts


def rounded_weights(
    model: ModelShape, layout: Layout, numerics: TrainerNumerics, stage: int, backward: bool = True
) -> Iterator[MemoryPart]:
    """What INT4 QAT makes of the weights in forward, kept for backward by every micro-batch in flight; where
    layers are recomputed, one group of them at a time, and without `backward` one layer.
    """
    if not numerics.int4_qat:
        return
    weights, width = rank_weights(model, layout, stage), PLAIN_BYTES[numerics.dtype]
    count = weights.experts if model.experts else weights.quantised
    copies, how = layout.pp - stage, "kept for backward"
    layers = layout.stages(model.num_layers)[stage]
    if not backward:
        count, copies, how = count // layers, 1, "one layer at a time"
    elif numerics.recompute == "full":
        at_once = min(numerics.recompute_num_layers, layers)
        count, copies, how = count * at_once // layers, 1, f"of {at_once} recomputed layers"
    flying = f" × {copies} micro-batches in flight" if copies > 1 else ""
    told = f"{count:,} fake-quantised weights × {width} B{flying}, {how}"
    yield MemoryPart("rounded weights", count * width * copies, told)


def _optimizer(weights: RankWeights, layout: Layout, numerics: TrainerNumerics) -> MemoryPart:
    if numerics.optimizer_on_host:
        return MemoryPart("optimizer", 0, "in host memory")
    size, formula = optimizer_bytes(weights, layout, numerics)
    return MemoryPart("optimizer", size, formula)


def optimizer_bytes(weights: RankWeights, layout: Layout, numerics: TrainerNumerics) -> tuple[int, str]:
    """Bytes of moments (and of the fp32 master of 16-bit weights) per rank, wherever they lie."""
    each = ADAM_BYTES + (MASTER_BYTES if PLAIN_BYTES[numerics.dtype] < 4 else 0)
    shards, expert_shards = (layout.dp * layout.cp, layout.edp) if numerics.distributed_optimizer else (1, 1)
    size = each * (weights.dense // shards + weights.experts // expert_shards)
    formula = f"({weights.dense:,} / {shards} + {weights.experts:,} / {expert_shards}) × {each} B"
    return size, formula


def kept_per_token(model: ModelShape, layout: Layout) -> float:
    """Numbers that one layer keeps per token and rank: norms, residuals, q, k, v, attention output, MLP."""
    return 4 * _residual(model, layout) + (model.attention_width + model.mlp_width) / layout.tp


def _residual(model: ModelShape, layout: Layout) -> float:
    return model.hidden_size / (layout.tp if layout.sequence_parallel else 1)


def training_activations(
    model: ModelShape, layout: Layout, numerics: TrainerNumerics, stage: int, tokens: int
) -> MemoryPart:
    """What backward keeps of the micro-batches that one rank has in flight."""
    width, layers = PLAIN_BYTES[numerics.dtype], layout.stages(model.num_layers)[stage]
    in_flight = layout.pp - stage
    per_layer, saved = kept_per_token(model, layout), _residual(model, layout)
    if numerics.recompute != "full":
        numbers, how = in_flight * layers * per_layer, f"{layers} layers whole"
    elif numerics.recompute_method == "block":
        recomputed = min(numerics.recompute_num_layers, layers)
        numbers = in_flight * (recomputed * saved + (layers - recomputed) * per_layer) + per_layer
        how = f"{recomputed} of {layers} layers recomputed"
    else:
        chunk = min(numerics.recompute_num_layers, layers)
        numbers = in_flight * -(-layers // chunk) * saved + chunk * per_layer
        how = f"inputs of {layers} layers and {chunk} recomputed"
    flying = f" × {in_flight} micro-batches in flight" if in_flight > 1 else ""
    return MemoryPart(
        "activations", int(tokens * numbers * width), f"{tokens:,} tokens, {how}{flying}, {width} B a number"
    )


def forward_activations(
    model: ModelShape, layout: Layout, numerics: TrainerNumerics, tokens: int
) -> MemoryPart:
    """One layer at a time: nothing is kept for a backward pass."""
    width = PLAIN_BYTES[numerics.dtype]
    numbers = kept_per_token(model, layout)
    return MemoryPart("activations", int(tokens * numbers * width), f"{tokens:,} tokens, one layer at a time")


def logits(
    model: ModelShape, layout: Layout, numerics: TrainerNumerics, tokens: int, backward: bool
) -> MemoryPart:
    """Logits of a micro-batch on the last stage, their fp32 working copy, and in training its gradient."""
    width, vocabulary = PLAIN_BYTES[numerics.dtype], -(-model.vocab_size // layout.tp)
    chunk = min(tokens, numerics.log_probs_chunk_tokens or tokens)
    whole = width * (2 if backward and chunk < tokens else 1)
    working = 8 if backward else 4
    return MemoryPart(
        "logits",
        vocabulary * (tokens * whole + chunk * working),
        f"{vocabulary:,} of the vocabulary × ({tokens:,} tokens × {whole} B + {chunk:,} × {working} B)",
    )


def routes(model: ModelShape, layout: Layout, stage: int, tokens: int) -> MemoryPart:
    """Recorded expert ids of a micro-batch, eight bytes each as the router takes them."""
    layers = model.num_moe_layers * layout.stages(model.num_layers)[stage] // model.num_layers
    return MemoryPart(
        "routes",
        tokens * layers * model.top_k * 8,
        f"{tokens:,} tokens × {layers} layers × {model.top_k} × 8 B",
    )
