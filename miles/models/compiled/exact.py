"""Exact numerics that are compiled: a token's bits are those of the decode kernel, which calls the same code.

The code works row by row, in an order that depends on the row alone, so nothing has to be measured. Backward
passes are compiled ones or torch's: only forwards meet the engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miles.arch.spec import MoeSpec, Scoring
from miles.models import swiglu as activation
from miles.models.compiled.attention import CompiledAttention
from miles.models.compiled.library import Library, addresses, plain
from miles.models.compiled.numerics import CompiledNumerics
from miles.models.experts import ExpertKernels
from miles.models.kv_cache import KVCache
from miles.models.routing import Gating


class CompiledExactNumerics(CompiledNumerics):
    """fp32 on one CPU thread, for what `planning.exact_kernels` admits. A cache is read by the decode kernel
    alone."""

    name = "exact"
    shares_long_prompts = True

    def __init__(self, library: Library) -> None:
        super().__init__(library)
        self.gating = Gating(self._choose_experts, self._weigh_experts)

    def chosen(self) -> dict[str, str]:
        return {
            "rows": "compiled, one running sum a number",
            "experts": "compiled, added in the order of their ids",
            "attention": "compiled, fp32, position after position",
        }

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            out: Tensor = _Linear.apply(rows, weight, bias, self._library)
        else:
            out = _linear(self._library, rows, weight, bias)
        return out.view(*x.shape[:-1], len(weight))

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return activation.swiglu(gate_up, self._swiglu)

    def router_scores(self, x: Tensor, router: Tensor, scoring: Scoring) -> Tensor:
        assert scoring == "softmax", "the decode kernel has no other"
        logits = self.linear(x, router)
        if torch.is_grad_enabled():
            out: Tensor = _RouterScores.apply(logits, self._library)
            return out
        return _router_scores(self._library, logits)

    def log_softmax(self, logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        logits = logits.contiguous()
        of_rows = torch.as_tensor(temperature, dtype=torch.float32).expand(len(logits), 1).contiguous()
        out = torch.empty_like(logits)
        self._library.log_softmax(*_at(logits, of_rows), *logits.shape, *_at(out))
        return out

    def expert_kernels(self, gate_up: Tensor, down: Tensor) -> ExpertKernels:
        return self._experts

    def takes_segments(self, cu_seqlens: Tensor, prompt_of: Tensor | None = None) -> bool:
        return False

    def packed_attention(
        self, cu_seqlens: Tensor, cache: KVCache | None = None, slots: Tensor | None = None
    ) -> CompiledAttention:
        assert cache is None, "the decode kernel reads what is kept in a cache"
        return self._in_segments(cu_seqlens)

    def cached_attention(self, cache: KVCache, lengths: Tensor) -> Any:
        raise AssertionError("the decode kernel decodes")

    def chunk_attention(self, cache: KVCache, slot: int, start: int, num_tokens: int) -> Any:
        raise AssertionError("the decode kernel reads chunks")

    def _swiglu(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._library.swiglu(*_at(gate_up), *out.shape, *_at(out))
        return out

    def _choose_experts(self, scores: Tensor, spec: MoeSpec, bias: Tensor | None) -> Tensor:
        assert bias is None and spec.num_groups == 1, "the decode kernel has neither"
        scores = scores.contiguous()
        ids = torch.empty(len(scores), spec.top_k, dtype=torch.long)
        self._library.choose_experts(*_at(scores), *scores.shape, spec.top_k, ids.data_ptr())
        return ids

    def _weigh_experts(self, scores: Tensor, ids: Tensor, spec: MoeSpec) -> Tensor:
        if torch.is_grad_enabled():
            out: Tensor = _WeighExperts.apply(scores, ids, spec.norm_topk_prob, self._library)
            return out
        return _weigh_experts(self._library, scores, ids, spec.norm_topk_prob)


def _at(*tensors: Tensor | None) -> list[int | None]:
    assert plain(*(x for x in tensors if x is not None)), "exact kernels compute in fp32 on the CPU"
    return addresses(*tensors)


def _linear(library: Library, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = x.new_empty(len(x), len(weight))
    library.linear(*_at(x, weight, bias), *x.shape, len(weight), *_at(out))
    return out


def _router_scores(library: Library, logits: Tensor) -> Tensor:
    out = torch.empty_like(logits)
    library.router_scores(*_at(logits), *logits.shape, *_at(out))
    return out


def _weigh_experts(library: Library, scores: Tensor, ids: Tensor, normed: bool) -> Tensor:
    scores, ids = scores.contiguous(), ids.contiguous()
    out = scores.new_empty(ids.shape)
    library.weigh_experts(*_at(scores), ids.data_ptr(), *scores.shape, ids.shape[1], normed, *_at(out))
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, library: Library) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(library, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            torch.mm(grad, weight) if of_x else None,
            torch.mm(grad.t(), x) if of_weight else None,
            grad.sum(0) if of_bias else None,
            None,
        )


class _RouterScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, library: Library) -> Tensor:
        scores = _router_scores(library, logits)
        ctx.save_for_backward(scores)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scores,) = ctx.saved_tensors
        return scores * (grad - (grad * scores).sum(-1, keepdim=True)), None


class _WeighExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, ids: Tensor, normed: bool, library: Library) -> Tensor:
        weights = _weigh_experts(library, scores, ids, normed)
        ctx.save_for_backward(scores, ids, weights)
        ctx.normed = normed
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, ids, weights = ctx.saved_tensors
        if ctx.normed:
            kept = scores.gather(1, ids).sum(-1, keepdim=True)
            grad = (grad - (grad * weights).sum(-1, keepdim=True)) / kept
        return torch.zeros_like(scores).scatter_(1, ids, grad), None, None, None
