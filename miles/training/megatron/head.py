"""Log-probs of the trained rows at the end of a pipeline, over a vocabulary that tensor parallelism cuts.

Each rank holds some rows of the head, so that maxima, sums of exponentials and the targets' own logits are
joined over the ranks; a `[tokens, vocabulary]` tensor exists for a chunk of tokens at a time, and backward
computes it again. Shapes: R trained rows, C of a chunk, D hidden, v vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from miles.models.logprob import CHUNK_ELEMENTS, token_log_probs
from miles.models.logprob import best_tokens as one_head_best_tokens
from miles.models.softcap import softcapped
from miles.training.megatron.attention import PackedRows
from miles.training.megatron.context_parallel import joined
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.model import PolicyModel
from miles.training.native.micro_batches import MicroBatch


def trained_log_probs(
    model: PolicyModel,
    layout: MegatronLayout,
    hidden_t1D: Tensor,
    rows: PackedRows,
    micro_batch: MicroBatch,
    temperature: float,
    with_entropy: bool,
    chunk_tokens: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies, fp32 [R], the same on all tensor- and context-parallel ranks.

    Args:
        hidden_t1D: of the last stage; this rank's share of the rows with sequence parallelism.
    """
    weight = model.head_weight
    places_R, targets_R, split = micro_batch.trained_R, micro_batch.targets_R, rows.split
    if split is not None:
        mine_R, places_R = split.places(places_R)
        targets_R = targets_R[mine_R]
    # A model in low precision hands out fp32.
    hidden_RD = whole_rows(layout, hidden_t1D).index_select(0, places_R).to(weight.dtype)
    found = row_log_probs(
        model, layout, hidden_RD, weight, targets_R, temperature, with_entropy, chunk_tokens
    )
    if split is None:
        return found
    log_probs, entropy = found
    return joined(log_probs, mine_R), None if entropy is None else joined(entropy, mine_R)


def whole_rows(layout: MegatronLayout, hidden_t1D: Tensor) -> Tensor:
    """Hidden states [T, D] that every tensor-parallel rank multiplies with its rows of the head."""
    hidden = hidden_t1D
    if layout.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    elif layout.tp > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return hidden.squeeze(1)


def row_log_probs(
    model: PolicyModel,
    layout: MegatronLayout,
    hidden_RD: Tensor,
    weight: Tensor,
    targets_R: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`trained_log_probs` of rows of `whole_rows`. `weight`: `model.head_weight`, or it without gradient."""
    softcap = model.spec.logit_softcap
    if layout.tp == 1:
        return token_log_probs(
            hidden_RD, weight, targets_R, temperature, chunk_tokens, with_entropy, softcap=softcap
        )
    first, own = _own_rows(model, weight)
    chunk = chunk_tokens or max(1, CHUNK_ELEMENTS // weight.shape[0])
    log_probs, entropy = _VocabularyParallel.apply(
        hidden_RD, own, targets_R - first, temperature, chunk, with_entropy, softcap
    )
    return log_probs, entropy if with_entropy else None


@torch.no_grad()
def best_tokens(model: PolicyModel, layout: MegatronLayout, hidden_RD: Tensor, weight: Tensor) -> Tensor:
    """int64 [R]: the first choice for each row, the same on all tensor-parallel ranks."""
    if layout.tp == 1:
        return one_head_best_tokens(hidden_RD, weight)
    first, own = _own_rows(model, weight)
    best, tokens = [], []
    for hidden_CD in hidden_RD.split(max(1, CHUNK_ELEMENTS // weight.shape[0])):
        value, token = _logits(hidden_CD, own, 1.0).max(1)
        best.append(value)
        tokens.append(token + first)
    if not best:
        return hidden_RD.new_zeros(0, dtype=torch.int64)
    own_best, own_token = torch.cat(best), torch.cat(tokens)
    top = _joined(own_best.clone(), dist.ReduceOp.MAX)
    return _joined(torch.where(own_best == top, own_token, model.valid_vocab), dist.ReduceOp.MIN)


def _own_rows(model: PolicyModel, weight: Tensor) -> tuple[int, Tensor]:
    """This rank's first token, and its rows of the head without those that pad the vocabulary."""
    first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
    return first, weight[: max(0, min(weight.shape[0], model.valid_vocab - first))]


def _logits(hidden_CD: Tensor, weight: Tensor, temperature: float, softcap: float | None = None) -> Tensor:
    return softcapped(hidden_CD @ weight.t(), softcap).float() / temperature


def _joined(values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    dist.all_reduce(values, operation, group=parallel_state.get_tensor_model_parallel_group())
    return values


def _own_targets(targets_C: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in this rank's rows, float [C, 1], and where, int64 [C, 1]."""
    mine = (targets_C >= 0) & (targets_C < size)
    return mine.float().unsqueeze(1), targets_C.clamp(0, max(0, size - 1)).unsqueeze(1)


class _VocabularyParallel(torch.autograd.Function):
    """`models.logprob.token_log_probs` over cut rows. The gradient of `hidden` is this rank's part of it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        log_probs, log_sums, entropies = [], [], []
        for hidden_CD, targets_C in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = _logits(hidden_CD, weight, temperature, softcap)
            largest = _joined(logits.amax(1, keepdim=True), dist.ReduceOp.MAX)
            exponentials = (logits - largest).exp_()
            mine, place = _own_targets(targets_C, weight.shape[0])
            parts = [exponentials.sum(1, keepdim=True), logits.gather(1, place) * mine]
            if with_entropy:
                parts.append((exponentials * logits).sum(1, keepdim=True))
            total, target, *weighted = _joined(torch.cat(parts, 1)).split(1, 1)
            log_sum = largest + total.log()
            log_sums.append(log_sum)
            log_probs.append((target - log_sum).squeeze(1))
            entropies += [(log_sum - part / total).squeeze(1) for part in weighted]
        entropy = torch.cat(entropies) if with_entropy else hidden.new_empty(0, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_sums), entropy)
        ctx.temperature, ctx.chunk, ctx.softcap = temperature, chunk, softcap
        ctx.set_materialize_grads(False)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_sums, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits = _logits(hidden[rows], weight, ctx.temperature, ctx.softcap)
            log_p = logits - log_sums[rows]
            p = log_p.exp()
            grad_logits = torch.zeros_like(p)
            if grad is not None:
                mine, place = _own_targets(targets[rows], weight.shape[0])
                scale = grad[rows].unsqueeze(1)
                grad_logits.sub_(p * scale).scatter_add_(1, place, scale * mine)
            if grad_entropy is not None:
                factor = grad_entropy[rows].unsqueeze(1)
                grad_logits.sub_(p * (log_p + entropy[rows].unsqueeze(1)) * factor)
            grad_logits = grad_logits.div_(ctx.temperature)
            if ctx.softcap is not None:
                grad_logits.mul_(1 - (logits * ctx.temperature / ctx.softcap).square_())
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += (grad_logits.t() @ hidden[rows]).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None
