"""Exact verification: which guesses stand, and what follows them, so that the output is a draw of the policy.

Certain guesses (`matching`): every node draws its successor as plain decoding does, and the draw is followed
down the tree while a guess has it. The output is token for token that of plain decoding. It is rejection
sampling of a certain proposal: a guess stands with its probability p, and given that it falls, the draw is
distributed as p without it.

Drawn guesses (`rejection`): guess x from q stands with probability min(1, p(x) / q(x)); the first that falls
is replaced by a draw from max(p - q, 0), normalised (https://arxiv.org/abs/2211.17192, theorem 1).

Acceptance, replacement and draft have random streams of their own, keyed by position as the plain draw is:
what becomes of a token depends on its request only. Shapes: n requests, W guesses, N nodes (W + 1), V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.rollout.native.draft_tree import Proposal
from miles.rollout.native.keyed_random import ACCEPT, REPLACE, substream, uniform
from miles.rollout.native.sampler import Distribution, SamplingRows, inverse_cdf


@dataclass(frozen=True)
class Verdict:
    """What stands of a proposal, up to P - 1 guesses of a request.

    Attributes:
        path: int64 [n, P], node numbers from the root on; the first `counts` (int64 [n], at least 1) stand.
        ids, log_probs: int64 and float32 [n, P], the token that follows each of these nodes.
        fell: bool [n], whether there was a guess behind the last node that stands.
    """

    path: Tensor
    counts: Tensor
    ids: Tensor
    log_probs: Tensor
    fell: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Verdict]) -> Verdict:
        """The verdicts on consecutive requests as one."""
        width = max(part.path.shape[1] for part in parts)

        def column(name: str) -> Tensor:
            grids = [getattr(part, name) for part in parts]
            if grids[0].dim() == 1:
                return torch.cat(grids)
            return torch.cat([F.pad(grid, (0, width - grid.shape[1])) for grid in grids])

        return cls(*(column(field.name) for field in fields(cls)))


def matching(drawn: Tensor, log_probs: Tensor, proposal: Proposal) -> Verdict:
    """Follow what each node drew (ids and log-probs [n, N]) while there is such a guess."""
    num, width = proposal.tokens.shape
    rows = torch.arange(num, device=drawn.device)
    at = torch.zeros(num, dtype=torch.int64, device=drawn.device)
    alive = torch.ones(num, dtype=torch.bool, device=drawn.device)
    path = [at]
    counts = torch.ones_like(at)
    for _ in range(int(proposal.depths.max()) if width else 0):
        wanted = drawn[rows, at].unsqueeze(1)
        hit = (proposal.parents == at.unsqueeze(1)) & (proposal.tokens == wanted) & proposal.valid
        alive = alive & hit.any(1)
        at = torch.where(alive, hit.to(torch.uint8).argmax(1) + 1, at)
        path.append(at)
        counts += alive
    path_NP = torch.stack(path, 1)
    fell = ((proposal.parents == at.unsqueeze(1)) & proposal.valid).any(1)
    return Verdict(path_NP, counts, drawn.gather(1, path_NP), log_probs.gather(1, path_NP), fell)


def rejection(
    target: Distribution, node_rows: SamplingRows, proposal: Proposal, rows: SamplingRows, lengths: Tensor
) -> Verdict:
    """Judge a chain of drawn guesses.

    Args:
        target: of every node of every request, n * N rows in that order; rows of invalid nodes are not read.
        node_rows, rows: sampling parameters of the n * N nodes, and of the n requests.
        lengths: int64 [n], tokens of each request so far.
    """
    assert proposal.probs is not None
    num, width = proposal.tokens.shape
    steps = torch.arange(width + 1, device=lengths.device)
    p_NWV = greedy_rows_certain(target.probs, target.allowed, node_rows).view(num, width + 1, -1)
    p_NWV = p_NWV / p_NWV.sum(-1, keepdim=True)
    q_NWV = proposal.probs / proposal.probs.sum(-1, keepdim=True)
    guesses = proposal.tokens.unsqueeze(2)
    p_guess, q_guess = (x.gather(2, guesses).squeeze(2).double() for x in (p_NWV[:, :width], q_NWV))
    positions = lengths.unsqueeze(1) + steps
    coins = uniform(substream(rows.stream, ACCEPT).unsqueeze(1), positions[:, :width])
    stands = proposal.valid & (coins * q_guess < p_guess)
    counts = 1 + stands.cumprod(1).sum(1)
    last = counts - 1
    index = torch.arange(num, device=lengths.device)
    fell = last < proposal.valid.sum(1)
    p_NV = p_NWV[index, last]
    rest_NV = (p_NV - q_NWV[index, last.clamp(max=width - 1)]).clamp_(min=0)
    # Where p and q are one but for rounding there is nothing left over, and p itself is drawn from.
    rest_NV = torch.where(rest_NV.sum(1, keepdim=True) > 0, rest_NV, p_NV)
    at = lengths + last
    replaced = inverse_cdf(rest_NV, uniform(substream(rows.stream, REPLACE), at))
    followed = inverse_cdf(p_NV, uniform(rows.stream, at))
    ids = torch.cat((proposal.tokens, proposal.tokens.new_zeros(num, 1)), 1)
    ids[index, last] = torch.where(fell, replaced, followed)
    log_probs = target.log_probs.view(num, width + 1, -1).gather(2, ids.unsqueeze(2)).squeeze(2)
    return Verdict(steps.expand(num, -1), counts, ids, log_probs, fell)


def greedy_rows_certain(probs: Tensor, scores: Tensor, rows: SamplingRows) -> Tensor:
    """Probabilities [N, V]; of greedy rows all of it on the token with the highest score [N, V]."""
    if not rows.any_greedy:
        return probs
    best = torch.zeros_like(probs).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
    return torch.where(rows.greedy.unsqueeze(1), best, probs)
