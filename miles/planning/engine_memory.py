"""What one engine GPU holds: its part of the weights, and the KV cache in the rest of the static share."""

from __future__ import annotations

from dataclasses import dataclass

from miles.planning.formats import Format
from miles.planning.memory import MemoryPart
from miles.planning.model_shape import ModelShape


@dataclass(frozen=True)
class EnginePlan:
    """One GPU of an engine that spans `gpus` of them. `static_bytes` holds weights and KV cache, those of a
    draft of MTP layers included.
    """

    gpus: int
    weight_format: Format
    weight_bytes: int
    static_bytes: int
    kv_token_bytes: int
    draft_bytes: int = 0
    draft_token_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        """What is left for the caches; negative where the weights do not fit."""
        return self.static_bytes - self.weight_bytes - self.draft_bytes

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache of one engine holds."""
        return max(self.cache_bytes, 0) // (self.kv_token_bytes + self.draft_token_bytes)

    def weight_parts(self) -> list[MemoryPart]:
        """What stays while the caches are given up."""
        over = f"over {self.gpus} GPUs"
        parts = [MemoryPart("engine weights", self.weight_bytes, f"{self.weight_format} weights {over}")]
        if self.draft_bytes:
            told = f"MTP layers {over}, as many bytes a parameter as the model"
            parts.append(MemoryPart("draft weights", self.draft_bytes, told))
        return parts

    def parts(self, max_context_len: int) -> list[MemoryPart]:
        """The static share as parts."""
        tokens, whole = self.cache_tokens, self.cache_tokens // max_context_len
        of_draft = tokens * self.draft_token_bytes
        told = f"{tokens:,} tokens × {self.kv_token_bytes:,} B: {whole:,} sequences of {max_context_len:,}"
        parts = [*self.weight_parts(), MemoryPart("KV cache", max(self.cache_bytes, 0) - of_draft, told)]
        if self.draft_token_bytes:
            told = f"{tokens:,} tokens × {self.draft_token_bytes:,} B"
            parts.append(MemoryPart("draft cache", of_draft, told))
        return parts


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
    draft_layers: int = 0,
    draft_parameters: int = 0,
) -> EnginePlan:
    """One engine under tensor parallelism, which repeats key-value heads beyond their number.

    `kv_bytes`: bytes of one cached number (2, or 1 for an FP8 cache). `draft_layers`, `draft_parameters`: of
    the MTP layers that it drafts with, whose attention is that of the model.
    """
    weights = model.stored_bytes(weight_format, plain, int4_group_size)
    heads = max(model.num_kv_heads // gpus, 1)
    per_layer = heads * (model.cache_width // model.num_kv_heads) * kv_bytes
    return EnginePlan(
        gpus,
        weight_format,
        weights // gpus,
        int(gpu_bytes * static_fraction),
        kv_token_bytes=model.num_layers * per_layer,
        draft_bytes=weights * draft_parameters // model.total // gpus,
        draft_token_bytes=draft_layers * per_layer,
    )
