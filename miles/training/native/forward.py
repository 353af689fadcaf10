"""One forward over one micro-batch: which routes it follows, and log-probs or values of its trained rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from miles.models.attention import Attention
from miles.models.decoder import Decoder
from miles.models.logprob import token_log_probs
from miles.models.routing import Router
from miles.models.routing_stats import PassRoutes
from miles.models.segment_attention import SegmentAttention
from miles.training.native.micro_batches import MicroBatch


@dataclass(frozen=True)
class ForwardOutput:
    """Log-probs and entropy float32 [R] of the trained rows, and the router that the pass used."""

    log_probs_R: Tensor
    entropy_R: Tensor | None
    router: PassRoutes


class Gathered(Protocol):
    """A decoder cut over ranks (FSDP2). Its root stays gathered for the backward to come; where none comes,
    it has to be let go, or it would outlive the next update.
    """

    def reshard(self) -> None: ...


def _is_gathered(decoder: object) -> TypeGuard[Gathered]:
    return hasattr(decoder, "reshard")


def make_router(
    micro_batch: MicroBatch, *, replay: bool, measure: bool = False, load_balancing: bool = False
) -> Router:
    """Replay the micro-batch's routes where it has them and `replay` is set, decide otherwise.

    `measure`: also count how often the router's own decision differs from the recorded routes.
    """
    routes = micro_batch.routes_TLK
    if routes is None:
        return Router(load_balancing=load_balancing)
    if replay:
        return Router.replay(routes, measure_agreement=measure, load_balancing=load_balancing)
    return Router(compared_with=routes if measure else None, load_balancing=load_balancing)


def forward(
    decoder: Decoder,
    micro_batch: MicroBatch,
    router: Router,
    temperature: float,
    with_entropy: bool,
    chunk_tokens: int | None = None,
    on_hidden: Callable[[Tensor], None] | None = None,
) -> ForwardOutput:
    """Run the decoder on all rows and the head on the trained ones.

    `chunk_tokens`: tokens whose logits exist at once, see `token_log_probs`.
    `on_hidden` is given the detached final hidden states [T, D] while embedding and head are whole.
    """
    attention = _attention(decoder, micro_batch)
    hidden_TD = decoder(micro_batch.tokens_T, micro_batch.positions_T, attention, router)
    log_probs_R, entropy_R = token_log_probs(
        hidden_TD.index_select(0, micro_batch.trained_R),
        decoder.head_weight,
        micro_batch.targets_R,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        with_entropy=with_entropy,
        linear=decoder.numerics.linear,
        softcap=decoder.spec.logit_softcap,
        log_softmax=decoder.numerics.log_softmax,
    )
    if on_hidden is not None:
        on_hidden(hidden_TD.detach())
    _let_go(decoder)
    return ForwardOutput(log_probs_R, entropy_R, router)


def token_values(critic: Decoder, micro_batch: MicroBatch) -> Tensor:
    """Values float32 [R] of the states in which the trained rows' targets are chosen. The critic routes by
    itself: recorded routes are the policy's. Its head computes in fp32.
    """
    attention = _attention(critic, micro_batch)
    hidden_TD = critic(micro_batch.tokens_T, micro_batch.positions_T, attention, Router())
    hidden_RD = hidden_TD.index_select(0, micro_batch.trained_R).float()
    values_R = hidden_RD @ critic.head_weight.float().squeeze(0)
    _let_go(critic)
    return values_R


def _let_go(decoder: Decoder) -> None:
    if not torch.is_grad_enabled() and _is_gathered(decoder):
        decoder.reshard()


def _attention(decoder: Decoder, micro_batch: MicroBatch) -> Attention:
    if micro_batch.shared is not None:
        return micro_batch.shared.attention(decoder.numerics, micro_batch.tokens_T.device)
    if decoder.spec.has_plain_attention and decoder.numerics.takes_segments(micro_batch.cu_seqlens_N1):
        return SegmentAttention(micro_batch.cu_seqlens_N1.numpy())
    return decoder.numerics.packed_attention(micro_batch.cu_seqlens_N1)
