"""What one engine GPU holds: its part of the weights, and the KV cache in the rest of the static share."""

from __future__ import annotations

from dataclasses import dataclass

from miles.planning.formats import Format
from miles.planning.memory import MemoryPart
from miles.planning.model_shape import ModelShape


@dataclass(frozen=True)
class EnginePlan:
    """One GPU of an engine that spans `gpus` of them. `static_bytes` holds weights and KV cache."""

    gpus: int
    weight_format: Format
    weight_bytes: int
    static_bytes: int
    kv_token_bytes: int

    @property
    def cache_bytes(self) -> int:
        """What is left for the KV cache; negative where the weights do not fit."""
        return self.static_bytes - self.weight_bytes

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache of one engine holds."""
        return max(self.cache_bytes, 0) // self.kv_token_bytes

    def parts(self, max_context_len: int) -> list[MemoryPart]:
        """The static share as parts."""
        whole = self.cache_tokens // max_context_len
        return [
            MemoryPart(
                "engine weights", self.weight_bytes, f"{self.weight_format} weights over {self.gpus} GPUs"
            ),
            MemoryPart(
                "KV cache",
                max(self.cache_bytes, 0),
                f"{self.cache_tokens:,} tokens × {self.kv_token_bytes:,} B: {whole:,} sequences of "
                f"{max_context_len:,}",
            ),
        ]


def plan_engine(
    model: ModelShape,
    *,
    gpus: int,
    gpu_bytes: int,
    static_fraction: float,
    weight_format: Format,
    plain: Format,
    int4_group_size: int,
    kv_bytes: int,
) -> EnginePlan:
    """One engine under tensor parallelism, which repeats key-value heads beyond their number.

    `kv_bytes`: bytes of one cached number (2, or 1 for an FP8 cache).
    """
    weights = model.stored_bytes(weight_format, plain, int4_group_size)
    heads = max(model.num_kv_heads // gpus, 1)
    per_token = model.num_layers * heads * (model.cache_width // model.num_kv_heads) * kv_bytes
    return EnginePlan(gpus, weight_format, weights // gpus, int(gpu_bytes * static_fraction), per_token)
