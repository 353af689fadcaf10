"""What a draft proposes: a tree of guesses behind the last token of every running request.

Shapes: n running requests, W guesses of one request at most, K depths, k branches, V vocabulary. Guess w is
node w + 1 of its request; node 0 is the last token. Parents come before their children.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miles.models.tree_attention import TreeNodes


@dataclass(frozen=True)
class Proposal:
    """Guesses and where they hang.

    Attributes:
        tokens: int64 [n, W].
        parents: int64 [n, W], the parent's node number.
        depths: int64 [n, W], from 1.
        valid: bool [n, W]; the parent of a valid guess is valid.
        probs: float32 [n, W, V] when the guesses were drawn: the distribution each one is a draw from, given
            its parents. None when they are certain, given what is known of the request.
        is_chain: guess w hangs on node w.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    valid: Tensor
    probs: Tensor | None
    is_chain: bool

    def __post_init__(self) -> None:
        assert self.probs is None or self.is_chain, "drawn guesses are verified as a chain"

    def within(self, room: Tensor) -> Proposal:
        """The guesses at depths up to `room` (int64 [n]); columns that no request uses go."""
        if not self.tokens.shape[1]:
            return self
        valid = self.valid & (self.depths <= room.unsqueeze(1))
        width = int(valid.any(0).nonzero().max()) + 1 if bool(valid.any()) else 0
        return Proposal(
            self.tokens[:, :width],
            self.parents[:, :width],
            self.depths[:, :width],
            valid[:, :width],
            None if self.probs is None else self.probs[:, :width],
            self.is_chain,
        )

    def take(self, index: Tensor) -> Proposal:
        """The guesses of these requests (int64 [m])."""
        return Proposal(
            self.tokens[index],
            self.parents[index],
            self.depths[index],
            self.valid[index],
            None if self.probs is None else self.probs[index],
            self.is_chain,
        )

    def ancestors(self) -> Tensor:
        """bool [n, W + 1, W + 1]: whether node i is node j or hangs on it."""
        num, width = self.tokens.shape
        seen = torch.eye(width + 1, dtype=torch.bool, device=self.tokens.device).repeat(num, 1, 1)
        rows = torch.arange(num, device=seen.device)
        for guess in range(width):
            seen[:, guess + 1] |= seen[rows, self.parents[:, guess]]
        return seen

    def nodes(self, prefix: Tensor) -> TreeNodes:
        """The valid nodes, roots included, of requests with `prefix` cached positions (int64 [n])."""
        used = torch.cat((self.valid.new_ones(len(prefix), 1), self.valid), 1)
        slots, numbers = used.nonzero(as_tuple=True)
        depths = torch.cat((self.depths.new_zeros(len(prefix), 1), self.depths), 1)
        return TreeNodes(slots, numbers, depths[slots, numbers], prefix, self.ancestors(), self.is_chain)


def no_guesses(num: int, device: torch.device) -> Proposal:
    """For `num` requests."""
    nothing = torch.zeros((num, 0), dtype=torch.int64, device=device)
    return chain(nothing, nothing.bool())


def chain(tokens: Tensor, valid: Tensor, probs: Tensor | None = None) -> Proposal:
    """One guess after another: tokens and valid [n, K]; what follows an invalid guess is invalid."""
    steps = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return Proposal(tokens, steps, steps + 1, valid.cumprod(1).bool(), probs, is_chain=True)


def branches(tokens: Tensor, valid: Tensor, num_guesses: int) -> Proposal:
    """k chains behind the root, tokens and valid [n, k, K], of which `num_guesses` nodes are kept.

    The first guesses of a request's chains differ. Kept are the shallow ones first, and of one depth the
    chains in their order.
    """
    num, count, depth = tokens.shape
    if count == 1:
        return chain(tokens[:, 0, :num_guesses], valid[:, 0, :num_guesses])
    valid = valid.cumprod(2).bool()
    number = torch.arange(1, depth * count + 1, device=tokens.device)
    parents = (number - count).clamp(min=0)
    depths = (number - 1) // count + 1
    kept = slice(0, num_guesses)
    return Proposal(
        tokens.transpose(1, 2).reshape(num, -1)[:, kept],
        parents.expand(num, -1)[:, kept],
        depths.expand(num, -1)[:, kept],
        valid.transpose(1, 2).reshape(num, -1)[:, kept],
        None,
        is_chain=False,
    )
