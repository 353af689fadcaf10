"""Log-probabilities of given tokens, and entropy, without a [tokens, vocabulary] fp32 tensor for all tokens.

Tokens are taken in chunks; backward computes each chunk's logits again. The vocabulary is never split, so a
token's result does not depend on the chunking. Shapes: T tokens, C tokens of a chunk, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.models.narrow import product
from miles.models.softcap import softcap_slope, softcapped

Linear = Callable[[Tensor, Tensor], Tensor]
LogSoftmax = Callable[[Tensor, float], Tensor]

CHUNK_ELEMENTS = 1 << 24
"""Logits per chunk unless the caller says otherwise: 64 MiB in fp32."""


def scaled_log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log_softmax(logits / temperature) in fp32 over the last dimension: what every log-prob is made of.

    `temperature`: one number, or [..., 1] for a temperature per row.
    """
    logits = logits.float()
    if isinstance(temperature, Tensor) or temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, -1)


def token_log_probs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    with_entropy: bool = False,
    linear: Linear = F.linear,
    softcap: float | None = None,
    log_softmax: LogSoftmax = scaled_log_softmax,
) -> tuple[Tensor, Tensor | None]:
    """log p(targets) under softmax(softcap(hidden @ head_weightᵀ) / temperature), with gradients.

    Args:
        hidden: [T, D]. head_weight: [V, D]. targets: int64 [T].
        chunk_tokens: tokens per chunk; by default `CHUNK_ELEMENTS` logits.
        with_entropy: also return the entropy in nats, differentiable.
        linear: how the logits are computed (`Numerics.linear`).
        softcap: see `ArchSpec.logit_softcap`.
        log_softmax: of logits at the temperature (`Numerics.log_softmax`).

    Returns:
        fp32 [T], and the entropy fp32 [T] or None.
    """
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // head_weight.shape[0])
    log_probs, entropy = _TokenLogProbs.apply(
        hidden, head_weight, targets, temperature, chunk, with_entropy, linear, softcap, log_softmax
    )
    return log_probs, entropy if with_entropy else None


@torch.no_grad()
def best_tokens(
    hidden: Tensor, head_weight: Tensor, chunk_tokens: int | None = None, linear: Linear = F.linear
) -> Tensor:
    """The most probable token of every row of hidden [T, D]: int64 [T]. Chunks as in `token_log_probs`."""
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // head_weight.shape[0])
    return torch.cat([linear(part, head_weight).argmax(-1) for part in hidden.split(chunk)])


def _entropy(log_p_CV: Tensor) -> Tensor:
    return -(log_p_CV.exp() * log_p_CV).sum(-1)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
        linear: Linear,
        softcap: float | None,
        log_softmax: LogSoftmax,
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropies, log_p_CV = [], [], None
        for hidden_CD, targets_C in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits_CV = softcapped(linear(hidden_CD, head_weight), softcap)
            log_p_CV = log_softmax(logits_CV, temperature)
            log_probs.append(log_p_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1))
            if with_entropy:
                entropies.append(_entropy(log_p_CV))
        # A single chunk is small by choice of `chunk`: keeping it saves backward a matrix product.
        kept = log_p_CV if len(log_probs) == 1 and softcap is None else None
        entropy = torch.cat(entropies) if with_entropy else hidden.new_empty(0, dtype=torch.float32)
        ctx.save_for_backward(hidden, head_weight, targets, entropy, kept)
        ctx.temperature, ctx.chunk, ctx.linear, ctx.softcap = temperature, chunk, linear, softcap
        ctx.log_softmax = log_softmax
        ctx.set_materialize_grads(False)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, head_weight, targets, entropy, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head_weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            log_p_CV, logits_CV = kept, None
            if log_p_CV is None:
                logits_CV = softcapped(ctx.linear(hidden[rows], head_weight), ctx.softcap)
                log_p_CV = ctx.log_softmax(logits_CV, ctx.temperature)
            grad_logits = _grad_logits(
                log_p_CV, targets[rows], _rows(grad, rows), _rows(entropy, rows), _rows(grad_entropy, rows)
            )
            grad_logits = grad_logits.div_(ctx.temperature)
            if ctx.softcap is not None:
                assert logits_CV is not None
                grad_logits.mul_(softcap_slope(logits_CV.float(), ctx.softcap))
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = product(grad_logits, head_weight)
            grad_head += product(grad_logits.t(), hidden[rows])
        return grad_hidden, grad_head.to(head_weight.dtype), *(None,) * 7


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _grad_logits(
    log_p_CV: Tensor,
    targets: Tensor,
    grad: Tensor | None,
    entropy: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """d log p(target)/dz = onehot - p; dH/dz = -p (log p + H)."""
    p_CV = log_p_CV.exp()
    if grad_entropy is None:
        assert grad is not None
        p_CV.mul_(-grad.unsqueeze(1))
    else:
        assert entropy is not None
        factor_CV = (log_p_CV + entropy.unsqueeze(1)).mul_(-grad_entropy.unsqueeze(1))
        p_CV.mul_(factor_CV if grad is None else factor_CV.sub_(grad.unsqueeze(1)))
    return p_CV if grad is None else p_CV.scatter_add_(1, targets.unsqueeze(1), grad.unsqueeze(1))
