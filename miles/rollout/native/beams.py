"""Growing a tree of guesses level by level, and keeping the guesses that are most likely to stand.

At each level the best k paths go on, and each gives k candidates; of all candidates of all levels the
likeliest are proposed (https://arxiv.org/abs/2406.16858, section 4). Shapes: n requests, k branches, V
vocabulary, W nodes that went on so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.models.tree_attention import TreeNodes
from miles.rollout.native.draft_tree import Proposal


class Beams:
    """The k paths of each request that go on: `tokens` int64 [n, k] at their ends.

    `nodes` that went on are numbered level by level, k a level.
    """

    def __init__(self, tokens: Tensor, scores: Tensor, candidates: Tensor) -> None:
        self.tokens = tokens
        self._scores, self._depth = scores, 1
        # The place of each path's end among the candidates, counted over all levels.
        self._candidate = candidates
        num, branches = tokens.shape
        self._seen = torch.eye(branches, dtype=torch.bool, device=tokens.device).repeat(num, 1, 1)
        self._all: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_candidates = 0

    @classmethod
    def start(cls, probs: Tensor, branches: int) -> Beams:
        """From what is expected behind the last token of each request, [n, V]."""
        scores, tokens = probs.log().topk(min(branches, probs.shape[1]), dim=1)
        places = torch.arange(branches, device=probs.device).expand(tokens.shape)
        beams = cls(tokens, scores, places)
        beams._keep(tokens, scores, torch.zeros_like(tokens))
        return beams

    def newest(self, prefix: Tensor) -> TreeNodes:
        """The ends of the paths, as nodes behind `prefix` cached positions (int64 [n])."""
        num, branches = self.tokens.shape
        slots = torch.arange(num, device=prefix.device).repeat_interleave(branches)
        first = (self._depth - 1) * branches
        numbers = torch.arange(first, first + branches, device=prefix.device).repeat(num)
        depths = torch.full_like(numbers, self._depth - 1)
        return TreeNodes(slots, numbers, depths, prefix, self._seen, is_chain=False)

    def grow(self, probs: Tensor) -> Tensor:
        """Go one level deeper, by what is expected behind each path's end, [n * k, V].

        Returns int64 [n * k], the old path (request by request) that each new one goes on from.
        """
        num, branches = self.tokens.shape
        scores, tokens = probs.log().view(num, branches, -1).topk(branches, dim=2)
        scores = (scores + self._scores.unsqueeze(2)).flatten(1)
        tokens = tokens.flatten(1)
        first = self._num_candidates
        self._keep(tokens, scores, (self._candidate + 1).repeat_interleave(branches, 1))
        self._scores, chosen = scores.topk(branches, dim=1)
        parent = chosen // branches
        self.tokens, self._candidate = tokens.gather(1, chosen), first + chosen
        self._see(parent)
        self._depth += 1
        return (parent + torch.arange(num, device=parent.device).unsqueeze(1) * branches).flatten()

    def best(self, count: int) -> Proposal:
        """The `count` likeliest guesses of each request; a parent is never less likely than its child."""
        tokens, scores, parents = (torch.cat(parts, 1) for parts in zip(*self._all, strict=True))
        levels = [torch.full_like(part[0], depth + 1) for depth, part in enumerate(self._all)]
        depths = torch.cat(levels, 1)
        # Stable: of equals the parent, which comes first.
        likeliest = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
        order = likeliest.sort(dim=1).values
        numbers = torch.arange(1, order.shape[1] + 1, device=order.device).expand(order.shape)
        number = torch.zeros_like(tokens).scatter_(1, order, numbers)
        # Candidate c is 1 + c in `parents`, and 0 is the root.
        number = torch.cat((torch.zeros_like(number[:, :1]), number), 1)
        return Proposal(
            tokens.gather(1, order),
            number.gather(1, parents.gather(1, order)),
            depths.gather(1, order),
            scores.gather(1, order) > float("-inf"),
            None,
            is_chain=False,
        )

    def _keep(self, tokens: Tensor, scores: Tensor, parents: Tensor) -> None:
        self._all.append((tokens, scores, parents))
        self._num_candidates += tokens.shape[1]

    def _see(self, parent: Tensor) -> None:
        """Make room for k more nodes, each of which sees what its parent saw and itself."""
        num, branches = parent.shape
        width = self._seen.shape[1]
        newest = self._seen[:, width - branches :]
        inherited = newest.gather(1, parent.unsqueeze(2).expand(-1, -1, width))
        grown = self._seen.new_zeros(num, width + branches, width + branches)
        grown[:, :width, :width] = self._seen
        grown[:, width:, :width] = inherited
        grown[:, width:, width:] = torch.eye(branches, dtype=torch.bool, device=parent.device)
        self._seen = grown
