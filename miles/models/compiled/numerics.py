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
from miles.models.segment_attention import most_visible

LONGEST = 1024
"""Visible tokens. Up to here a pass takes 0.5 to 1.0 of its time in torch's blocked kernel, for heads of 16
to 128; beyond, torch catches up, with AVX2 sooner than with AVX-512 (`benchmarks/attention.py`)."""


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

    def takes_segments(self, cu_seqlens: Tensor, prompt_of: Tensor | None = None) -> bool:
        too_long = most_visible(cu_seqlens, prompt_of) > LONGEST
        return too_long and super().takes_segments(cu_seqlens, prompt_of)

    def packed_attention(
        self, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None
    ) -> Attention:
        on_cpu = cu_seqlens.device.type == "cpu"
        if cache is not None or not on_cpu or most_visible(cu_seqlens, None) > LONGEST:
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
