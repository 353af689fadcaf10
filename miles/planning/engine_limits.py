"""How much a native engine takes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config import RunConfig

PREFILL_TOKENS = 16384
"""Prompt tokens of one step where nothing is said, as SGLang has it on its largest GPUs."""


@dataclass(frozen=True)
class EngineLimits:
    """Bounds of one engine; what exceeds them waits."""

    running_requests: int
    """Samples decoded at once."""
    prefill_tokens: int
    """Prompt tokens read between two decode steps; a longer prompt is read in chunks."""
    kv_tokens: int
    """Tokens of all running requests, each at its longest."""
    context: int
    """Most tokens of one request."""
    captured_requests: int = 0
    """Decode steps of up to so many are CUDA graphs; 0: none is, as in every engine on a CPU."""

    @property
    def cached_tokens(self) -> int:
        """Tokens that memory is taken for: one prompt is shared or half read beside the running requests."""
        return self.kv_tokens + self.context


def plan_engine_limits(config: RunConfig, max_context_len: int, on_gpus: bool = False) -> EngineLimits:
    """The limits as set, else the defaults: on GPUs every decode step is captured."""
    chunk = config.sglang.chunked_prefill_size
    prefill = max(PREFILL_TOKENS, max_context_len) if chunk == -1 else chunk or PREFILL_TOKENS
    requests = config.engine.max_running_requests
    kv_tokens = config.sglang.max_total_tokens or requests * max_context_len
    captures = on_gpus and config.rollout.backend == "native" and not config.sglang.disable_cuda_graph
    captured = min(config.sglang.cuda_graph_max_bs_decode or requests, requests) if captures else 0
    return EngineLimits(requests, prefill, kv_tokens, max_context_len, captured)
