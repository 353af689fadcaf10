"""Decode steps captured as CUDA graphs: the host replays one instead of starting every kernel of every layer.

A graph has fixed shapes and reads fixed addresses: each is captured for R rows and W key positions, when they
are first needed. A step of n requests takes the next larger graph. Its rows n.. write to position 0 of slots
n.., which belong to nobody while n requests run, and nobody reads what they give.

Shapes: n running requests, R >= n rows, W key positions, V vocabulary, Lm MoE layers, k experts per token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.arch.spec import ArchSpec, AttentionSpec, MoeSpec
from miles.models.attention import CachedAttention
from miles.models.decoder import Decoder
from miles.models.kv_cache import KVCache
from miles.models.numerics import FastNumerics
from miles.models.projections import Projections
from miles.models.rotary import rotations
from miles.models.routing import Router

Step = Callable[[], None]
Capture = Callable[[Step], Step]
"""From a step on fixed buffers to one that does the same again."""

MOST_GRAPHS = 64
"""Kept at once; the one that was used longest ago goes first."""

FEWEST_KEYS = 256
"""The narrowest graph; each further one is twice as wide."""

WARM_UPS = 3
"""Eager runs before a capture, in which libraries choose kernels and take their workspaces, as torch asks."""

GROUPED_CAPABILITIES = (9, 10)
"""Major compute capabilities on which torch's grouped product in bf16 leaves group sizes on the GPU; on any
other it copies them to the host (`_grouped_mm_fallback` of aten, as of torch 2.10)."""


class CudaGraphs:
    """Captures into one pool of memory. Its graphs may use the same bytes: no two run at once, and nothing in
    the pool is read after the step that wrote it."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the GPU meanwhile is no part of the graph, and no error.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


class StaticAttention(CachedAttention):
    """`CachedAttention` over a width that the host has fixed, in torch's fused kernels.

    The query heads of one key head are laid out as the queries of a sequence: so keys are read once for all
    of them, and the memory-efficient kernel, which takes a mask but no `enable_gqa`, takes the step.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        if spec.softcap is not None:
            return super().attend(layer, q, k, v, spec)
        cache, n = self._cache, self.num_sequences
        cache.write(layer, self._rows, k, v)
        keys, values = (
            side[layer, :n, :, : self.num_keys].to(q.dtype) for side in (cache.keys, cache.values)
        )
        queries = q.reshape(n, spec.num_kv_heads, -1, spec.head_dim)
        mask = self._mask(spec).unsqueeze(1).to(q.dtype)
        out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=spec.head_dim**-0.5)
        return out.reshape(n, spec.query_width)


class CapturedDecode:
    """The decode steps of one engine. `obstacle`: why none is captured, until it serves another decoder."""

    def __init__(
        self,
        spec: ArchSpec,
        cache: KVCache,
        most_requests: int,
        new_pool: Callable[[], Capture] = CudaGraphs,
    ) -> None:
        """`cache`: its last slot is none that decodes."""
        self._spec, self._cache, self._new_pool = spec, cache, new_pool
        self.row_ladder = row_ladder(min(most_requests, cache.num_slots - 1))
        self.key_ladder = key_ladder(cache.max_len)
        rows, device = self.row_ladder[-1], cache.keys.device
        self._tokens, self._positions = torch.zeros(2, rows, dtype=torch.int64, device=device).unbind()
        self._logits = torch.empty(rows, spec.vocab_size, dtype=cache.keys.dtype, device=device)
        routes = rows, len(spec.moe_layers), spec.top_k if spec.is_moe else 0
        self._routes = torch.empty(routes, dtype=torch.int16, device=device)
        self._graphs: OrderedDict[tuple[int, int], tuple[Step, list[Tensor]]] = OrderedDict()
        self._decoder: Decoder | None = None
        self._addresses: list[int] = []
        self.obstacle: str | None = None

    def serve(self, decoder: Decoder) -> None:
        """Take the weights from here, also when they changed in place. Graphs stay where nothing moved."""
        addresses = [tensor.data_ptr() for tensor in chain(decoder.parameters(), decoder.buffers())]
        if decoder is self._decoder and addresses == self._addresses:
            return
        self._decoder, self._addresses = decoder, addresses
        self.obstacle = next(obstacles(decoder), None)
        self._graphs.clear()
        # A pool that no graph holds any more cannot be captured into again.
        self._capture = self._new_pool()

    def decode(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """As `Runner.decode`, whose step is to be taken where this gives None. What it gives is overwritten
        by the next step. The longest sequence is asked of the device once, before the step."""
        count = len(tokens)
        if self.obstacle is not None or count > self.row_ladder[-1]:
            return None
        filled = int(positions.max()) + 1
        assert filled <= self._cache.max_len, "a sequence outgrew its cache slot"
        rows = next(size for size in self.row_ladder if size >= count)
        keys = next(width for width in self.key_ladder if width >= filled)
        self._tokens[:count].copy_(tokens)
        self._positions[:count].copy_(positions)
        self._positions[count:rows].zero_()
        self._graph(rows, keys)()
        return self._logits[:count], self._routes[:count] if self._spec.is_moe else None

    def _graph(self, rows: int, keys: int) -> Step:
        if (rows, keys) not in self._graphs:
            tables = self._rotations()
            self._graphs[rows, keys] = self._capture(lambda: self._step(rows, keys)), tables
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end((rows, keys))
        return self._graphs[rows, keys][0]

    def _rotations(self) -> list[Tensor]:
        """What a graph reads and does not keep: a cache that others fill as well hands it to every step."""
        rotating = (layer.attention for layer in self._spec.layers if layer.attention.rotates)
        most, device = self._spec.max_position_embeddings, self._positions.device
        return [rotations(a.rope, a.rotary_width, most, device) for a in rotating]

    def _step(self, rows: int, keys: int) -> None:
        """What is captured: from the buffers to the buffers, and nothing is asked of the device."""
        assert self._decoder is not None, "the engine has weights before it has requests"
        router = Router.record()
        attention = StaticAttention(self._cache, self._positions[:rows], keys)
        hidden = self._decoder(self._tokens[:rows], self._positions[:rows], attention, router)
        self._logits[:rows].copy_(self._decoder.logits(hidden))
        if self._spec.is_moe:
            self._routes[:rows].copy_(router.recorded())


def row_ladder(most: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, …, `most`: from 4 on at most a third of a step's rows is padding."""
    sizes = sorted({1, *(factor << power for factor in (2, 3) for power in range(most.bit_length()))})
    return (*(size for size in sizes if size < most), most)


def key_ladder(max_len: int) -> tuple[int, ...]:
    """`FEWEST_KEYS` doubled again and again, and at last the whole length of a slot."""
    widths = (FEWEST_KEYS << power for power in range(max_len.bit_length()))
    return (*(width for width in widths if width < max_len), max_len)


def obstacles(decoder: Decoder) -> Iterator[str]:
    """What keeps the steps of a decoder out of a graph."""
    if type(decoder.numerics) is not FastNumerics:
        kind = type(decoder.numerics).__name__
        yield f"{decoder.numerics.name} numerics ({kind}) lay out a step on the host"
    if any(module.operands for module in decoder.modules() if isinstance(module, Projections)):
        yield "weights in a number format of their own, which may move when they are updated"
    if decoder.embed.is_cuda and decoder.spec.is_moe and not _groups_on_device(decoder):
        yield (
            "experts whose grouped product reads group sizes on the host; torch's kernel for Hopper and "
            "Blackwell takes bf16 and widths of whole 8"
        )


def _groups_on_device(decoder: Decoder) -> bool:
    sizes = [layer.mlp.intermediate_size for layer in decoder.spec.layers if isinstance(layer.mlp, MoeSpec)]
    major, _ = torch.cuda.get_device_capability(decoder.embed.device)
    whole = all(size % 8 == 0 for size in (decoder.spec.hidden_size, *sizes))
    return decoder.embed.dtype == torch.bfloat16 and whole and major in GROUPED_CAPABILITIES
