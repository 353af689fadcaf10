"""A draft without a model: what followed the same few tokens the last times, in any request of the run.

One hashed table per context length holds a successor and a count of confirmations (a majority vote, Boyer
and Moore 1981). The longest context that is known wins. The samples of a prompt group resemble each other, so
they share the table; a wrong or stale guess costs speed and nothing else. Shapes: n requests, k branches, K
depths, C context length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miles.rollout.native.draft import SlotState
from miles.rollout.native.draft_tree import Proposal, branches
from miles.rollout.native.keyed_random import mix
from miles.rollout.native.sampler import SamplingRows
from miles.rollout.native.slots import Slots

CONTEXT_LENGTHS = (8, 4, 2)
"""In the order in which they are asked."""
TABLE_BITS = 18
UNKNOWN = -1
FULL_CONFIDENCE = 4
"""Confirmations that a successor is credited with at most: so many contradictions replace it."""


class NgramTable:
    """Contexts and their successors, for O context lengths; hashes that collide overwrite each other."""

    def __init__(self, device: torch.device) -> None:
        lengths = torch.tensor(CONTEXT_LENGTHS, device=device)
        size = len(lengths) << TABLE_BITS
        self._successor = torch.full((size,), UNKNOWN, dtype=torch.int64, device=device)
        self._count = torch.zeros(size, dtype=torch.int64, device=device)
        self._starts = torch.arange(len(lengths), device=device) << TABLE_BITS
        self._first = CONTEXT_LENGTHS[0] - lengths
        # What a context length does not see weighs nothing in its hash.
        places = torch.arange(CONTEXT_LENGTHS[0], device=device)
        self._weights = mix(places + 1) * (places >= self._first.unsqueeze(1))

    def learn(self, windows: Tensor) -> None:
        """Take in tokens with what came before: int64 [M, longest context + 1], UNKNOWN before a start."""
        buckets, known = self._buckets(windows[:, :-1])
        at, tokens = buckets[known], windows[:, -1:].expand(known.shape)[known]
        same = self._successor[at] == tokens
        credit = self._count[at] + torch.where(same, 1, -1)
        lost = credit < 0
        # Of several windows of one bucket any may win; the table stays a table.
        self._successor[at] = torch.where(lost, tokens, self._successor[at])
        self._count[at] = credit.clamp_(max=FULL_CONFIDENCE).masked_fill_(lost, 0)

    def successors(self, contexts: Tensor, branches: int) -> Tensor:
        """Distinct guesses of what follows [n, longest context], best first, int64 [n, branches]; UNKNOWN
        where there are fewer. A context that ends in UNKNOWN has none."""
        buckets, known = self._buckets(contexts)
        found = self._successor[buckets].masked_fill_(~known, UNKNOWN)
        for order in range(1, found.shape[1] if branches > 1 else 0):
            repeated = (found[:, :order] == found[:, order : order + 1]).any(1)
            found[:, order].masked_fill_(repeated, UNKNOWN)
        known_first = (found == UNKNOWN).to(torch.int8).argsort(dim=1, stable=True)
        guesses = found.gather(1, known_first)[:, :branches]
        return F.pad(guesses, (0, branches - guesses.shape[1]), value=UNKNOWN)

    def _buckets(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Place of each context at each length, int64 [n, O], and whether it is that long, bool [n, O]."""
        hashes = mix((contexts.unsqueeze(1) * self._weights).sum(2))
        known = (contexts[:, self._first] != UNKNOWN) & (contexts[:, -1:] != UNKNOWN)
        return (hashes & ((1 << TABLE_BITS) - 1)) + self._starts, known


def windows(tokens: Tensor, ends: Tensor, counts: Tensor) -> Tensor:
    """The last `counts` (int64 [n]) tokens before `ends` (int64 [n]) of each row of tokens [n, C], each with
    the longest context before it: int64 [M, longest context + 1]."""
    longest = CONTEXT_LENGTHS[0]
    rows = torch.repeat_interleave(counts)
    offsets = torch.arange(len(rows), device=tokens.device) - (counts.cumsum(0) - counts)[rows]
    at = (ends - counts)[rows] + offsets
    columns = at.unsqueeze(1) + torch.arange(-longest, 1, device=tokens.device)
    picked = tokens[rows.unsqueeze(1), columns.clamp(min=0)]
    return picked.masked_fill(columns < 0, UNKNOWN)


def continuations(table: NgramTable, tokens: Tensor, lengths: Tensor, count: int, depth: int) -> Tensor:
    """`count` chains of `depth` guesses for each row of tokens [n, C], int64 [n, k, K]; UNKNOWN where a chain
    has ended."""
    longest = CONTEXT_LENGTHS[0]
    columns = lengths.unsqueeze(1) + torch.arange(-longest, 0, device=tokens.device)
    context = tokens.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, UNKNOWN)
    first = table.successors(context, count)
    context = context.repeat_interleave(count, 0)
    chains = [first.flatten()]
    for _ in range(depth - 1):
        context = torch.cat((context[:, 1:], chains[-1].unsqueeze(1)), 1)
        chains.append(table.successors(context, 1).squeeze(1))
    return torch.stack(chains, 1).view(len(tokens), count, depth)


class NgramDraft:
    """The draft of the native engine (protocol: `draft.Draft`) over one table for all requests."""

    state: Sequence[SlotState] = ()
    reads_hidden = False

    def __init__(self, slots: Slots, branches: int, num_guesses: int) -> None:
        self._slots, self._branches, self._num_guesses = slots, branches, num_guesses
        self._table = NgramTable(slots.lengths.device)

    def read_prompts(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[int], hidden: Sequence[Tensor]
    ) -> None:
        for prompt in prompts:
            tokens = torch.tensor([list(prompt)], device=self._slots.tokens.device)
            whole = tokens.new_tensor([len(prompt)])
            self._table.learn(windows(tokens, whole, whole))

    def grew(self, first: int, counts: Tensor, hidden: Tensor | None) -> None:
        span = slice(first, first + len(counts))
        self._table.learn(windows(self._slots.tokens[span], self._slots.lengths[span], counts))

    def propose(self, running: int, rows: SamplingRows, num_steps: int) -> Proposal:
        tokens, lengths = self._slots.tokens[:running], self._slots.lengths[:running]
        guesses = continuations(self._table, tokens, lengths, self._branches, num_steps)
        return branches(guesses.clamp(min=0), guesses != UNKNOWN, self._num_guesses)
