"""Finds the exact numerics of this machine for one model: the blocks of rows in which its products are
computed (`row_search`) and the query rows of attention; checks every other operation, and a whole decoder.

All is measured at start-up, with the threads of the run, on the shapes of the model; where an operation has
no batch-invariant choice, the run is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.arch.spec import ArchSpec, AttentionSpec, DenseMlpSpec, LayerSpec, MoeSpec, StreamsSpec
from miles.models.decoder import Decoder
from miles.models.exact_sums import QUERY_STEP
from miles.models.experts import routed_experts, scaled_inputs
from miles.models.geglu import geglu
from miles.models.logprob import scaled_log_softmax
from miles.models.norm import rms_norm
from miles.models.numerics import ExactNumerics
from miles.models.path_probe import AttentionProbe, decoding_agrees
from miles.models.row_search import BY_COLUMN, Kind, ProbedBlocks, cancelling, impossible
from miles.models.softcap import softcapped

ROWS = 72
ROW_COUNTS = (*range(1, 34), 48, 63, 64, 65, 71)
"""Runs out of ROWS in which operations on whole rows are tried."""
MIN_QUERIES = (1, 2, 4, QUERY_STEP)
MOST_EXPERTS = 8
"""Experts of the model that is tried as a whole."""
FEW_TOKENS = 64
"""Its vocabulary."""
SHORT_EXTENT = 25
"""Tokens that are seen in a window or chunk, or chosen, in attention and in a model that are tried: sequences
there are short."""

RowOperation = Callable[[Tensor], Tensor]


@torch.inference_mode()
def find_exact_numerics(
    spec: ArchSpec, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> ExactNumerics:
    """The cheapest exact numerics under which every operation of `spec` is batch-invariant.

    Call it with torch's thread count as the run will have it.

    Raises:
        PreflightRefused: with the operation and the shape that nothing makes invariant.
    """
    generator = torch.Generator(device).manual_seed(0)
    probe = _Probe(spec, dtype, torch.device(device), generator)
    blocks = ProbedBlocks(device)
    for kind in _matrices(spec, dtype):
        blocks[kind]
    numerics = ExactNumerics(blocks, 1, torch.get_num_threads())
    numerics = replace(numerics, min_queries=probe.min_queries(numerics))
    probe.check_row_operations(numerics)
    probe.check_decoder(numerics)
    return numerics


class _Probe:
    def __init__(
        self, spec: ArchSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.spec, self.dtype, self.device, self.generator = spec, dtype, device, generator

    def min_queries(self, numerics: ExactNumerics) -> int:
        """Fewest query rows with which decoding position by position equals the packed attention."""
        return max(self._min_queries(attention, numerics) for attention in _kinds_of_attention(self.spec))

    def _min_queries(self, attention: AttentionSpec, numerics: ExactNumerics) -> int:
        probe = AttentionProbe(self.spec, attention, self.generator, self.device)
        for least in MIN_QUERIES:
            if probe.products_agree(least) and probe.paths_agree(replace(numerics, min_queries=least)):
                return least
        shape = f"{attention.num_heads} heads on {attention.num_kv_heads}, width {attention.head_dim}"
        raise impossible(f"attention of {shape}")

    def check_row_operations(self, numerics: ExactNumerics) -> None:
        """Raise for an operation on whole rows whose bits depend on the other rows."""
        for name, width, operation in self._row_operations(numerics):
            rows = self._cancelling(ROWS, width, -1.0)
            if _varies(operation, rows):
                raise impossible(f"{name} of width {width} in {self.dtype}")

    def check_decoder(self, numerics: ExactNumerics) -> None:
        """Raise when a decoder of one layer of each kind, with few experts, gives decoded tokens other hidden
        states than packed ones."""
        spec = smallest(self.spec)
        decoder = Decoder(spec, self.dtype).to(self.device)
        for name, parameter in decoder.named_parameters():
            fill = torch.ones if name.endswith("norm") else self._random
            scale = 1.0 if name.endswith("norm") else parameter.shape[-1] ** -0.5
            parameter.copy_(fill(*parameter.shape)).mul_(scale)
        decoder.use_numerics(numerics)
        if not decoding_agrees(decoder, numerics, self.generator):
            raise impossible(f"a decoder as a whole in {self.dtype}")

    def _row_operations(self, numerics: ExactNumerics) -> Iterator[tuple[str, int, RowOperation]]:
        spec = self.spec
        weight = self._random(spec.hidden_size)
        eps, plus_one = spec.rms_norm_eps, spec.norm_plus_one
        yield "rms norm", spec.hidden_size, lambda x: rms_norm(x, weight, eps, plus_one)
        cap = spec.logit_softcap
        yield "log-softmax", spec.vocab_size, lambda x: scaled_log_softmax(softcapped(x, cap), 0.9)
        for width in {x.attention.indexer.head_dim for x in spec.layers if x.attention.indexer}:
            yield "layer norm", width, lambda x: F.layer_norm(x, x.shape[-1:])
        for mlp in dict.fromkeys(layer.mlp for layer in spec.layers):
            if isinstance(mlp, DenseMlpSpec) and mlp.activation == "gelu_tanh":
                yield "geglu", 2 * mlp.intermediate_size, partial(_geglu, mlp.sparsity, numerics)
            else:
                yield "swiglu", 2 * mlp.intermediate_size, numerics.swiglu
            if isinstance(mlp, MoeSpec):
                if mlp.shared_size:
                    yield "swiglu", 2 * mlp.shared_size, numerics.swiglu
                yield "a block of experts", spec.hidden_size, self._experts(mlp, numerics)

    def _experts(self, moe: MoeSpec, numerics: ExactNumerics) -> RowOperation:
        """Router and experts, few of them."""
        hidden, width = self.spec.hidden_size, moe.intermediate_size
        router = self._random(moe.num_experts, hidden)
        count = min(moe.num_experts, MOST_EXPERTS)
        gate_up = self._cancelling(count * 2 * width, hidden).view(count, 2 * width, hidden)
        down = self._random(count, hidden, width)
        if moe.stacked:
            gate_up, down = gate_up.mT.contiguous().mT, down.mT.contiguous().mT
        block = scaled_inputs if moe.scales_inputs else routed_experts
        kernels = numerics.expert_kernels(gate_up, down)

        def run(x: Tensor) -> Tensor:
            weights, ids = torch.topk(
                numerics.router_scores(x, router, moe.scoring), min(moe.top_k, count), -1
            )
            weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
            return block(x, ids % count, weights, gate_up, down, kernels)

        return run

    def _cancelling(self, count: int, width: int, sign: float = 1.0) -> Tensor:
        return cancelling(count, width, sign, self.generator, self.device).to(self.dtype)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)


def _kinds_of_attention(spec: ArchSpec) -> Iterator[AttentionSpec]:
    """One of each kind that attends differently."""
    kinds = {}
    for layer in spec.layers:
        attention = _short(layer.attention)
        for kind in (replace(attention, indexer=None), *_of_indexer(attention)):
            heads = kind.num_heads, kind.num_kv_heads, kind.head_dim
            kinds[heads, kind.extent, kind.softcap] = kind
    yield from kinds.values()


def _of_indexer(attention: AttentionSpec) -> Iterator[AttentionSpec]:
    """The products of the indexer are those of an attention over one head of keys."""
    indexer = attention.indexer
    if indexer is not None:
        heads, width = indexer.num_heads, indexer.head_dim
        yield replace(attention, num_heads=heads, num_kv_heads=1, head_dim=width, latent=None, indexer=None)


def _short(attention: AttentionSpec) -> AttentionSpec:
    """The same with a window or chunk, or a choice of keys, that short sequences outgrow."""
    window, chunk = (None if extent is None else min(extent, SHORT_EXTENT) for extent in attention.extent)
    indexer = attention.indexer
    if indexer is not None:
        indexer = replace(indexer, top_k=min(indexer.top_k, SHORT_EXTENT))
    return replace(attention, window=window, chunk=chunk, indexer=indexer)


def smallest(spec: ArchSpec) -> ArchSpec:
    """One layer of each kind with at most `MOST_EXPERTS` experts, and a few tokens' embeddings."""
    layers: list[LayerSpec] = []
    kinds = list(dict.fromkeys(spec.layers))
    for layer in kinds:
        mlp = layer.mlp
        if isinstance(mlp, MoeSpec):
            experts = min(mlp.num_experts, MOST_EXPERTS)
            mlp = replace(mlp, num_experts=experts, top_k=min(mlp.top_k, experts), num_groups=1, top_groups=1)
        attention = _short(layer.attention)
        if attention.keys_of is not None:
            attention = replace(attention, keys_of=kinds.index(spec.layers[attention.keys_of]))
        layers.append(replace(layer, attention=attention, mlp=mlp))
    vocab, streams = min(spec.vocab_size, FEW_TOKENS), spec.streams
    if streams is not None:
        streams = replace(streams, layer_vocab=min(streams.layer_vocab, FEW_TOKENS))
    return replace(spec, layers=tuple(layers), vocab_size=vocab, streams=streams)


def _geglu(sparsity: float, numerics: ExactNumerics, x: Tensor) -> Tensor:
    return geglu(x, sparsity, numerics.gelu)


def _matrices(spec: ArchSpec, dtype: torch.dtype) -> Iterator[Kind]:
    """The kinds of products of the model. Both projections of an expert share a layout."""
    hidden = spec.hidden_size
    yield ((spec.vocab_size, hidden),), dtype
    if spec.streams is not None:
        for shape in _stream_matrices(spec.streams, hidden, spec.num_layers):
            yield (shape,), dtype
    for layer in dict.fromkeys(spec.layers):
        attention, mlp = layer.attention, layer.mlp
        gate_up, down = (2 * mlp.intermediate_size, hidden), (hidden, mlp.intermediate_size)
        for shape in _attention_matrices(attention, hidden):
            yield (shape,), dtype
        if isinstance(mlp, MoeSpec):
            experts = (gate_up, down), dtype
            yield (*experts, BY_COLUMN) if mlp.stacked else experts
            yield ((mlp.num_experts, hidden),), torch.float32
            if mlp.shared_size:
                yield ((2 * mlp.shared_size, hidden),), dtype
                yield ((hidden, mlp.shared_size),), dtype
        else:
            yield (gate_up,), dtype
            yield (down,), dtype


def _stream_matrices(streams: StreamsSpec, hidden: int, num_layers: int) -> Iterator[tuple[int, int]]:
    count, rank, width = streams.count, streams.laurel_rank, streams.layer_width
    yield num_layers * width, hidden
    yield hidden, hidden
    yield count, hidden
    yield count**2, count
    yield count, count
    for narrow in (rank, width):
        yield narrow, hidden
        yield hidden, narrow


def _attention_matrices(attention: AttentionSpec, hidden: int) -> Iterator[tuple[int, int]]:
    latent, heads = attention.latent, attention.num_heads
    if latent is None:
        yield attention.qkv_width, hidden
        yield hidden, attention.query_width
        return
    yield sum(latent.down_widths), hidden
    yield heads * latent.query_dim, latent.query_rank or hidden
    yield latent.kv_rank, latent.plain_dim
    yield latent.value_dim, latent.kv_rank
    yield hidden, heads * latent.value_dim
    if attention.indexer is not None:
        indexer = attention.indexer
        yield indexer.num_heads * indexer.head_dim, latent.query_rank or hidden
        yield indexer.head_dim, hidden
        yield indexer.num_heads, hidden


def _varies(operation: RowOperation, rows: Tensor) -> bool:
    """Whether some run of consecutive rows gives other bits than among all rows."""
    together = operation(rows)
    return any(not _agrees(operation, rows, together, count) for count in ROW_COUNTS)


def _agrees(operation: RowOperation, rows: Tensor, together: Tensor, count: int) -> bool:
    whole = len(rows) // count * count
    runs = zip(rows[:whole].split(count), together[:whole].split(count), strict=True)
    return all(torch.equal(operation(run.clone()), expected) for run, expected in runs)
