"""One token per row: temperature, top-k, top-p, minimum length, greedy; every operation works row by row.

Shapes: N rows, V vocabulary, S stop ids. The draw is an inverse CDF of one keyed uniform number per row, so a
row's token depends on its own logits and its own number only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from miles.models.logprob import scaled_log_softmax
from miles.rollout.native.keyed_random import uniform

CDF_BLOCK = 1024
"""Vocabularies above this are searched block first: the float64 cumulative sum then runs over V / CDF_BLOCK
sums."""

NO_TOP_K = torch.iinfo(torch.int64).max
NO_TOP_P = float("inf")
NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Per-row parameters, and what the rows need at all (so that a plain batch pays for nothing else).

    stream int64 [N]; temperature float32 [N] (1 for greedy rows); greedy bool [N]; top_k int64 [N]
    (NO_TOP_K: off); top_p float64 [N] (NO_TOP_P: off); min_length int64 [N], the sequence length below
    which stop ids are not drawn; stop_ids int64 [N, S], padded with NO_TOKEN.
    """

    stream: torch.Tensor
    temperature: torch.Tensor
    greedy: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_length: torch.Tensor
    stop_ids: torch.Tensor
    any_temperature: bool
    any_greedy: bool
    any_truncated: bool
    any_min_length: bool

    def take(self, index: torch.Tensor) -> SamplingRows:
        """The parameters of these rows (int64 [M]), in this order and as often as named."""
        columns = ("stream", "temperature", "greedy", "top_k", "top_p", "min_length", "stop_ids")
        return replace(self, **{name: getattr(self, name).index_select(0, index) for name in columns})


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a row's token is drawn from, [N, V] each: `log_probs` over the whole vocabulary at the row's
    temperature, `allowed` without the stop ids of too short rows, `probs` of those after top-k and top-p (not
    normalised)."""

    log_probs: torch.Tensor
    allowed: torch.Tensor
    probs: torch.Tensor


LogSoftmax = Callable[[torch.Tensor, float | torch.Tensor], torch.Tensor]
"""See `Numerics.log_softmax`."""


def sample(
    logits_NV: torch.Tensor,
    rows: SamplingRows,
    positions_N: torch.Tensor,
    log_softmax: LogSoftmax = scaled_log_softmax,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the token at `positions_N` (its index in the sequence) of every row.

    Returns ids int64 [N] and their log-probs float32 [N] over the whole vocabulary at the row's temperature.
    """
    target = distribution(logits_NV, rows, positions_N, log_softmax)
    ids_N = draw(target, rows, uniform(rows.stream, positions_N))
    return ids_N, target.log_probs.gather(1, ids_N[:, None]).squeeze(1)


def distribution(
    logits_NV: torch.Tensor,
    rows: SamplingRows,
    positions_N: torch.Tensor,
    log_softmax: LogSoftmax = scaled_log_softmax,
) -> Distribution:
    """What the token at `positions_N` of every row is drawn from."""
    temperature = rows.temperature[:, None] if rows.any_temperature else 1.0
    log_probs_NV = log_softmax(logits_NV, temperature)
    allowed_NV = log_probs_NV
    if rows.any_min_length:
        allowed_NV = suppress_stops(log_probs_NV, rows.stop_ids, positions_N < rows.min_length)
    probs_NV = allowed_NV.exp()
    if rows.any_truncated:
        probs_NV = truncate(probs_NV, rows.top_k, rows.top_p)
    return Distribution(log_probs_NV, allowed_NV, probs_NV)


def draw(target: Distribution, rows: SamplingRows, u_N: torch.Tensor) -> torch.Tensor:
    """One token per row from its number in (0, 1), int64 [N]; greedy rows take the most likely one."""
    ids_N = inverse_cdf(target.probs, u_N)
    if rows.any_greedy:
        ids_N = torch.where(rows.greedy, target.allowed.argmax(dim=-1), ids_N)
    return ids_N


def suppress_stops(
    log_probs_NV: torch.Tensor, stop_ids_NS: torch.Tensor, too_short_N: torch.Tensor
) -> torch.Tensor:
    """Log-probs with the stop ids of too short rows removed and the rest renormalised."""
    hit_NS = too_short_N[:, None] & (stop_ids_NS != NO_TOKEN)
    banned_NV = torch.zeros_like(log_probs_NV, dtype=torch.bool)
    # Several columns of a row may name the same id (the padding is sent to id 0), so hits are added, not
    # assigned.
    banned_NV = (
        banned_NV.to(torch.int32).scatter_add_(1, stop_ids_NS.clamp(min=0), hit_NS.to(torch.int32)) > 0
    )
    renormalised_NV = torch.log_softmax(log_probs_NV.masked_fill(banned_NV, float("-inf")), dim=-1)
    return torch.where(too_short_N[:, None], renormalised_NV, log_probs_NV)


def truncate(probs_NV: torch.Tensor, top_k_N: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    """Zero what top-k and top-p exclude, each measured on the given distribution (SGLang's joint order).

    Top-p keeps the smallest set of most likely tokens whose mass reaches p: a token stays while the mass
    before it is below p. Ties are broken by token id, so exactly k tokens survive top-k.
    """
    sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
    before_NV = sorted_NV.cumsum(dim=-1, dtype=torch.float64) - sorted_NV
    rank_V = torch.arange(probs_NV.shape[1], device=probs_NV.device)
    keep_NV = (rank_V < top_k_N[:, None]) & (before_NV < top_p_N[:, None])
    return torch.zeros_like(probs_NV).scatter_(1, order_NV, sorted_NV * keep_NV)


def inverse_cdf(weights_NV: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """The smallest index whose cumulative weight exceeds u times the total; never an index of weight 0.

    Args:
        weights_NV: non-negative, float32, not necessarily normalised, at least one positive per row.
        u_N: float64, 0 < u < 1.

    Sums are float64: a float32 running sum over a large vocabulary loses tokens below 6e-8 of the mass.
    """
    if weights_NV.shape[1] <= CDF_BLOCK:
        return _first_above(weights_NV.cumsum(dim=-1, dtype=torch.float64), u_N)
    padded_NV = F.pad(weights_NV, (0, -weights_NV.shape[1] % CDF_BLOCK))
    blocks_NBC = padded_NV.view(len(u_N), -1, CDF_BLOCK)
    block_cdf_NB = blocks_NBC.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    block_N = _first_above(block_cdf_NB, u_N)
    chosen_NC = blocks_NBC[torch.arange(len(u_N), device=u_N.device), block_N]
    inside_N = _position_inside(block_cdf_NB, block_N, u_N)
    return block_N * CDF_BLOCK + _first_above(chosen_NC.cumsum(dim=-1, dtype=torch.float64), inside_N)


def _first_above(cdf_NV: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """Index of the first entry above u times the last one."""
    target_N1 = u_N[:, None] * cdf_NV[:, -1:]
    index_N = torch.searchsorted(cdf_NV, target_N1, right=True).squeeze(1)
    # There is one, unless the row is NaN: that search runs off the end, and the log-prob will show the NaN.
    return index_N.clamp_(max=cdf_NV.shape[1] - 1)


def _position_inside(cdf_NV: torch.Tensor, index_N: torch.Tensor, u_N: torch.Tensor) -> torch.Tensor:
    """Where u times the total lies inside the step of the CDF at `index_N`: float64 [N] in [0, 1)."""
    upper_N = cdf_NV.gather(1, index_N[:, None]).squeeze(1)
    lower_N = F.pad(cdf_NV, (1, 0)).gather(1, index_N[:, None]).squeeze(1)
    # Below 1 in exact arithmetic; a quotient of two rounded differences may reach it.
    return (u_N * cdf_NV[:, -1] - lower_N) / (upper_N - lower_N) * (1 - 2.0**-52)
