"""How the decoder computes: `fast`, or `exact`, where a token's bits depend on its own sequence only.

One object of this module serves trainer and engine. In `exact` an incremental decode in any batch gives the
bits of a packed forward in any micro-batch, so the log-prob gap between the two sides is exactly 0. What
breaks that on a CPU, and what each operation of `ExactNumerics` does about it:

- matrix libraries take other kernels for other numbers of rows: `row_blocks` of counts that agree;
- scaled_dot_product_attention sums a query's keys in another order than a decode step: `exact_attention`;
- some of torch's vectorised functions round the last elements of a run otherwise, and threads cut runs
  anywhere: only operations with one rounding per element, exp, tanh, and reductions over whole rows are used;
- fused multiply-add may or may not be taken: products and sums are rounded one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.arch.spec import AttentionSpec, Scoring
from miles.models import experts, geglu, norm, rotary
from miles.models import swiglu as activation
from miles.models.attention import Attention, CachedAttention, ChunkAttention, PackedAttention
from miles.models.exact_attention import ExactCachedAttention, ExactChunkAttention, ExactPackedAttention
from miles.models.exact_prefix import ExactPrefixAttention
from miles.models.exact_sums import KEY_BLOCK, padded_keys
from miles.models.invariant import in_order, softmax_of_rows
from miles.models.kv_cache import KVCache
from miles.models.logprob import scaled_log_softmax
from miles.models.narrow import pays_widened, widened_linear
from miles.models.prefix_attention import PrefixAttention
from miles.models.routing import GATING, Gating
from miles.models.row_blocks import RowBlocks, blocked_linear
from miles.models.row_search import BY_COLUMN, Kind
from miles.models.segment_attention import pays_in_segments
from miles.models.tree_attention import ExactChainAttention, ExactTreeAttention, TreeAttention, TreeNodes


class Numerics(Protocol):
    """The operations that differ between the modes. T tokens, D hidden, E experts."""

    name: str
    gating: Gating
    shares_long_prompts: bool
    """Whether `prefix_attention` takes any length: scores are not materialised, and gradients exist."""

    def chosen(self) -> dict[str, str]:
        """What was found on this machine, in words; nothing where nothing had to be found."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, K] @ weight [N, K]ᵀ + bias [N] -> [T, N]."""
        ...

    def per_head(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [T, H, K] @ weights [H, N, K]ᵀ, head by head -> [T, H, N]."""
        ...

    def rotations(self, spec: AttentionSpec, num_positions: int, positions: Tensor) -> Tensor:
        """What `rotate` takes for these positions (int64 [T])."""
        ...

    def rotate(self, heads: Tensor, rotation: Tensor) -> Tensor:
        """Rotary embedding of heads [T, H, d]; d may come out permuted."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] -> [T, I]."""
        ...

    def gelu(self, x: Tensor) -> Tensor:
        """GELU by its tanh approximation."""
        ...

    def mixtures(self, weights: Tensor, streams: Tensor) -> Tensor:
        """For each j the sum over i of weights [T, j, i] times streams [i, T, D]: [j, T, D]."""
        ...

    def router_scores(self, x: Tensor, router: Tensor, scoring: Scoring) -> Tensor:
        """Softmax over experts, or sigmoid, of x [T, D] @ router [E, D]ᵀ: fp32 [T, E]."""
        ...

    def log_softmax(self, logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        """See `logprob.scaled_log_softmax`."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
        """See `norm.rms_norm`."""
        ...

    def expert_kernels(self, gate_up: Tensor, down: Tensor) -> experts.ExpertKernels:
        """How experts gate_up [E, 2I, D], down [E, D, I] are computed."""
        ...

    def takes_segments(self, cu_seqlens: Tensor, prompt_of: Tensor | None = None) -> bool:
        """Whether a trainer's plain attention is computed by `segment_attention.SegmentAttention` of these
        arguments, instead of `packed_attention` or `prefix_attention`."""
        ...

    def packed_attention(
        self, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None
    ) -> Attention:
        """See `attention.PackedAttention`."""
        ...

    def prefix_attention(
        self, prompt_cu_seqlens: Tensor, own_cu_seqlens: Tensor, prompt_of_own: Tensor
    ) -> Attention:
        """See `prefix_attention.PrefixAttention`."""
        ...

    def cached_attention(self, cache: KVCache, lengths: Tensor) -> Attention:
        """See `attention.CachedAttention`."""
        ...

    def step_rows(self, count: int) -> int:
        """Rows in which a step of `count` tokens is computed best: `count`, or more that nobody reads."""
        ...

    def tree_attention(self, cache: KVCache, nodes: TreeNodes) -> Attention:
        """See `tree_attention.TreeAttention`."""
        ...

    def chunk_attention(self, cache: KVCache, slot: int, start: int, num_tokens: int) -> Attention:
        """See `attention.ChunkAttention`."""
        ...

    def attention_input(self, heads: Tensor) -> Tensor:
        """Queries, keys or values [T, H, d] in the type in which attention computes; its output is rounded to
        the type that they had."""
        ...

    def cache_length(self, positions: int) -> int:
        """Positions a cache slot must have to hold `positions` of them."""
        ...


class FastNumerics:
    """The quickest kernels; the last bits of a result depend on what else is computed with it."""

    name = "fast"
    gating = GATING
    shares_long_prompts = True

    def chosen(self) -> dict[str, str]:
        return {}

    def attention_input(self, heads: Tensor) -> Tensor:
        # torch's CPU kernels round scores and probabilities to the type of the heads, each at another place:
        # every second number would differ between a step of decode and a forward.
        return heads.float() if heads.device.type == "cpu" else heads

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
        return norm.rms_norm(x, weight, eps, plus_one)

    def expert_kernels(self, gate_up: Tensor, down: Tensor) -> experts.ExpertKernels:
        return experts.FAST

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if pays_widened(x, min(len(x), len(weight))):
            return widened_linear(x, weight, bias)
        return F.linear(x, weight, bias)

    def per_head(self, x: Tensor, weights: Tensor) -> Tensor:
        if pays_widened(x, len(x)):
            return widened_linear(x.transpose(0, 1), weights).transpose(0, 1)
        return torch.bmm(x.transpose(0, 1), weights.transpose(1, 2)).transpose(0, 1)

    def rotations(self, spec: AttentionSpec, num_positions: int, positions: Tensor) -> Tensor:
        table = rotary.rotations(spec.rope, spec.rotary_width, num_positions, positions.device)
        return table.index_select(0, positions)

    def rotate(self, heads: Tensor, rotation: Tensor) -> Tensor:
        return rotary.rotate(heads, rotation)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return activation.swiglu(gate_up)

    def gelu(self, x: Tensor) -> Tensor:
        return geglu.gelu(x)

    def mixtures(self, weights: Tensor, streams: Tensor) -> Tensor:
        return torch.einsum("tji,itd->jtd", weights, streams)

    def router_scores(self, x: Tensor, router: Tensor, scoring: Scoring) -> Tensor:
        if scoring == "sigmoid":
            # In fp32 for any weights, as the families that score so do.
            return torch.sigmoid(F.linear(x.float(), router.float()))
        # Experts first, tokens last: softmax over a short last dimension is ten times slower on CPU.
        return torch.softmax(self.linear(router, x).float(), 0).t()

    def log_softmax(self, logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        return scaled_log_softmax(logits, temperature)

    def takes_segments(self, cu_seqlens: Tensor, prompt_of: Tensor | None = None) -> bool:
        return pays_in_segments(cu_seqlens)

    def packed_attention(
        self, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None
    ) -> Attention:
        return PackedAttention(cu_seqlens, cache, slots)

    def prefix_attention(
        self, prompt_cu_seqlens: Tensor, own_cu_seqlens: Tensor, prompt_of_own: Tensor
    ) -> Attention:
        return PrefixAttention(prompt_cu_seqlens, own_cu_seqlens, prompt_of_own)

    def cached_attention(self, cache: KVCache, lengths: Tensor) -> CachedAttention:
        return CachedAttention(cache, lengths)

    def step_rows(self, count: int) -> int:
        return count

    def tree_attention(self, cache: KVCache, nodes: TreeNodes) -> TreeAttention:
        return TreeAttention(cache, nodes)

    def chunk_attention(self, cache: KVCache, slot: int, start: int, num_tokens: int) -> ChunkAttention:
        return ChunkAttention(cache, slot, start, num_tokens)

    def cache_length(self, positions: int) -> int:
        return positions


FAST = FastNumerics()


@dataclass(frozen=True)
class ExactNumerics:
    """Bit-equal in any batch.

    Attributes:
        blocks: how the products with each kind of matrix are computed, see `row_search.ProbedBlocks`.
        min_queries: fewest rows of a product inside attention.
        threads: torch's threads on this machine; with one, a run of elements is never cut.
    """

    blocks: Mapping[Kind, RowBlocks]
    min_queries: int
    threads: int
    name = "exact"
    gating = GATING
    shares_long_prompts = False

    def chosen(self) -> dict[str, str]:
        """Of `rows`, `experts` and `attention`. An operation that the probe has not met is not told."""
        experts = [blocks for kind, blocks in self.blocks.items() if len(kind[0]) > 1]
        told = {"rows": " or ".join(dict.fromkeys(map(str, self.blocks.values())))}
        if experts:
            most = min(max(blocks.batched, default=0) for blocks in experts)
            batched = f"equal groups of up to {most} rows in one batched product, else " if most else ""
            told["experts"] = f"{batched}a product per expert"
        rows, plural = self.min_queries, "s" if self.min_queries > 1 else ""
        told["attention"] = f"fp32, at least {rows} query row{plural}, keys in blocks of {KEY_BLOCK}"
        return told

    def attention_input(self, heads: Tensor) -> Tensor:
        return heads

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
        return norm.rms_norm(x, weight, eps, plus_one)

    def expert_kernels(self, gate_up: Tensor, down: Tensor) -> experts.ExpertKernels:
        # Asked for in every layer of every step: what follows from the shapes is kept.
        key = gate_up.shape, down.shape, gate_up.dtype, gate_up.stride(-1)
        kernels = self._kernels.get(key)
        if kernels is None:
            blocks = self._blocks(gate_up, down)
            kernels = experts.ExpertKernels(blocks, self._activation, fused_sum=False)
            self._kernels[key] = kernels
        return kernels

    @cached_property
    def _kernels(self) -> dict[object, experts.ExpertKernels]:
        return {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = blocked_linear(x, weight, self.blocks[(weight.shape,), weight.dtype])
        return out if bias is None else out + bias

    def per_head(self, x: Tensor, weights: Tensor) -> Tensor:
        heads = zip(x.unbind(1), weights.unbind(), strict=True)
        return torch.stack([self.linear(rows.contiguous(), w.contiguous()) for rows, w in heads], 1)

    def _blocks(self, *weights: Tensor) -> RowBlocks:
        shapes = tuple((weight.shape[-2], weight.shape[-1]) for weight in weights)
        if weights[0].stride(-1) != 1:
            return self.blocks[shapes, weights[0].dtype, BY_COLUMN]
        return self.blocks[shapes, weights[0].dtype]

    def rotations(self, spec: AttentionSpec, num_positions: int, positions: Tensor) -> Tensor:
        table = rotary.half_rotations(spec.rope, spec.rotary_width, num_positions, positions.device)
        return table.index_select(0, positions)

    def rotate(self, heads: Tensor, rotation: Tensor) -> Tensor:
        return rotary.rotate_halves(heads, rotation)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return activation.swiglu(gate_up, self._activation)

    def gelu(self, x: Tensor) -> Tensor:
        return geglu.gelu_of_exp(x)

    def mixtures(self, weights: Tensor, streams: Tensor) -> Tensor:
        by_stream = weights.float().permute(2, 1, 0).unsqueeze(-1)
        return in_order(by_stream[i] * stream for i, stream in enumerate(streams.float())).to(streams.dtype)

    def router_scores(self, x: Tensor, router: Tensor, scoring: Scoring) -> Tensor:
        # In fp32 for any weights: near ties between experts are common in bf16.
        logits = self.linear(x.float(), router.float())
        if scoring == "sigmoid":
            return torch.neg(logits).exp().add(1).reciprocal()
        return softmax_of_rows(logits)

    def log_softmax(self, logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        return scaled_log_softmax(logits, temperature)

    def takes_segments(self, cu_seqlens: Tensor, prompt_of: Tensor | None = None) -> bool:
        return False

    def packed_attention(
        self, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None
    ) -> ExactPackedAttention:
        return ExactPackedAttention(cu_seqlens, cache, slots)

    def prefix_attention(
        self, prompt_cu_seqlens: Tensor, own_cu_seqlens: Tensor, prompt_of_own: Tensor
    ) -> ExactPrefixAttention:
        return ExactPrefixAttention(prompt_cu_seqlens, own_cu_seqlens, prompt_of_own)

    def cached_attention(self, cache: KVCache, lengths: Tensor) -> ExactCachedAttention:
        return ExactCachedAttention(cache, lengths, self.min_queries)

    def step_rows(self, count: int) -> int:
        """The fewest that every product takes without filling up; once for all products of a step."""
        known = len(self.blocks)
        if known not in self._shared_rows:
            kinds = [blocks.alone for blocks in self.blocks.values()]
            self._shared_rows[known] = sorted(frozenset[int]().union(*kinds[:1]).intersection(*kinds))
        shared = self._shared_rows[known]
        at = bisect_left(shared, count)
        return shared[at] if at < len(shared) else count

    @cached_property
    def _shared_rows(self) -> dict[int, list[int]]:
        """Rows that all products take, by the number of products that were probed."""
        return {}

    def tree_attention(self, cache: KVCache, nodes: TreeNodes) -> Attention:
        if nodes.is_chain:
            return ExactChainAttention(cache, nodes)
        return ExactTreeAttention(cache, nodes, self.min_queries)

    def chunk_attention(self, cache: KVCache, slot: int, start: int, num_tokens: int) -> ExactChunkAttention:
        return ExactChunkAttention(cache, slot, start, num_tokens)

    def cache_length(self, positions: int) -> int:
        return padded_keys(positions)

    @property
    def _activation(self) -> activation.Forward:
        """A run of the gate's elements is a row of its projection, cut only by threads."""
        return activation.swiglu_forward if self.threads == 1 else activation.swiglu_of_exp
