"""What the engine asks of a draft, and what it tells it.

Shapes: n running requests in slots 0..n-1, W tokens that one step can add to a request, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from miles.rollout.native.draft_tree import Proposal
from miles.rollout.native.sampler import SamplingRows

Algorithm = Literal["NGRAM", "EAGLE", "NEXTN", "EAGLE3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationSettings:
    """How the engine guesses ahead.

    Attributes:
        num_steps: tokens guessed in a row; a request may ask for fewer.
        eagle_topk: branches of the tree; 1 is a chain.
        num_draft_tokens: nodes verified at once, the last token included; num_steps + 1 in a chain.
        draft_model_path: checkpoint of the draft; None: the model's own MTP layers, or none for NGRAM.
    """

    algorithm: Algorithm
    num_steps: int
    eagle_topk: int = 1
    num_draft_tokens: int
    draft_model_path: str | None = None

    def __post_init__(self) -> None:
        assert self.num_steps >= 1 and self.eagle_topk >= 1 and self.num_draft_tokens >= 2
        assert self.eagle_topk > 1 or self.num_draft_tokens == self.num_steps + 1


class SlotState(Protocol):
    """What a draft keeps for every slot; it moves as the keys and values of the policy do."""

    def copy_slot(self, source: int, destinations: list[int], length: int) -> None: ...

    def move_slots(self, sources: list[int], destinations: list[int], length: int) -> None: ...


class Draft(Protocol):
    """Guesses ahead. The tokens of every request, prompts included, are in `Slots.tokens`."""

    state: Sequence[SlotState]
    reads_hidden: bool
    """Whether it wants to read what the policy computed."""

    def read_prompts(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[int], hidden: Sequence[Tensor]
    ) -> None:
        """Prompts have been read into these slots; others may share them afterwards.

        `hidden`: per prompt what the draft reads of its tokens, [length, D]: `Runner.States.read`.
        """
        ...

    def grew(self, first: int, counts: Tensor, hidden: Tensor | None) -> None:
        """Slots first, first + 1, … have got `counts` (int64) new tokens, at the end of each.

        `hidden` [len(counts), W, D]: what the draft reads of the tokens from which each of them was drawn;
        None when it reads nothing.
        """
        ...

    def propose(self, running: int, rows: SamplingRows, num_steps: int) -> Proposal:
        """Guesses for slots 0..running-1, at most `num_steps` deep."""
        ...
