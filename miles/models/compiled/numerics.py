"""Fast numerics with the compiled operations where they take the shapes at hand; torch computes the rest."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from miles.models.attention import Attention
from miles.models.compiled import experts, norm
from miles.models.compiled.attention import CompiledAttention
from miles.models.compiled.library import Library, plain
from miles.models.experts import ExpertKernels
from miles.models.kv_cache import KVCache
from miles.models.numerics import FastNumerics

LONGEST = 128
"""Tokens; attention within longer sequences is quicker in torch's blocked kernel."""


class CompiledNumerics(FastNumerics):
    """fp32 on one CPU thread."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._experts = ExpertKernels(whole=partial(experts.routed_experts, library))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
        if x.ndim == 2 and weight.ndim == 1 and not plus_one and plain(x, weight):
            return norm.rms_norm(self._library, x, weight, eps)
        return super().rms_norm(x, weight, eps, plus_one)

    def expert_kernels(self, gate_up: Tensor, down: Tensor) -> ExpertKernels:
        if experts.takes(gate_up, down):
            return self._experts
        return super().expert_kernels(gate_up, down)

    def packed_attention(
        self, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None
    ) -> Attention:
        if cache is not None or cu_seqlens.device.type != "cpu" or int(cu_seqlens.diff().max()) > LONGEST:
            return super().packed_attention(cu_seqlens, cache, slots)
        return self._in_segments(cu_seqlens)

    def _in_segments(self, cu_seqlens: Tensor) -> CompiledAttention:
        alone = torch.full((len(cu_seqlens) - 1,), -1)
        in_torch = partial(FastNumerics.packed_attention, self, cu_seqlens)
        return CompiledAttention(self._library, cu_seqlens, alone, in_torch)

    def prefix_attention(
        self, prompt_cu_seqlens: Tensor, own_cu_seqlens: Tensor, prompt_of_own: Tensor
    ) -> Attention:
        in_torch = super().prefix_attention
        offsets = (prompt_cu_seqlens, own_cu_seqlens, prompt_of_own)
        if prompt_cu_seqlens.device.type != "cpu":
            return in_torch(*offsets)
        starts = torch.cat([prompt_cu_seqlens, own_cu_seqlens[1:] + prompt_cu_seqlens[-1]])
        prompts = torch.cat([torch.full((len(prompt_cu_seqlens) - 1,), -1), prompt_of_own])
        return CompiledAttention(self._library, starts, prompts, lambda: in_torch(*offsets))
