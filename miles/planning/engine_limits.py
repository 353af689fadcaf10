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

    @property
    def cached_tokens(self) -> int:
        """Tokens that memory is taken for: one prompt is shared or half read beside the running requests."""
        return self.kv_tokens + self.context


def plan_engine_limits(config: RunConfig, max_context_len: int) -> EngineLimits:
    """The limits as set, else the defaults."""
    chunk = config.sglang.chunked_prefill_size
    prefill = max(PREFILL_TOKENS, max_context_len) if chunk == -1 else chunk or PREFILL_TOKENS
    requests = config.engine.max_running_requests
    kv_tokens = config.sglang.max_total_tokens or requests * max_context_len
    return EngineLimits(requests, prefill, kv_tokens, max_context_len)
