"""Drafts without a model, for what a draft may do wrong and right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from miles.rollout.native.draft import Draft, SlotState
from miles.rollout.native.draft_tree import Proposal, chain
from miles.rollout.native.engine import NativeEngine
from miles.rollout.native.keyed_random import DRAFT, substream, uniform
from miles.rollout.native.sampler import SamplingRows, inverse_cdf
from miles.rollout.native.slots import Slots
from miles.rollout.native.verify import greedy_rows_certain


def use_draft(engine: NativeEngine, draft: Draft) -> None:
    speculation = engine._batch.speculation
    assert speculation is not None
    speculation.draft = draft


class _Stub:
    state: Sequence[SlotState] = ()
    reads_hidden = False

    def __init__(self, engine: NativeEngine) -> None:
        self.slots: Slots = engine._batch.slots

    def read_prompts(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[int], hidden: Sequence[Tensor]
    ) -> None: ...

    def grew(self, first: int, counts: Tensor, hidden: Tensor | None) -> None: ...


class GuessingDraft(_Stub):
    """Is certain that the sequence of slot 0 goes on like this."""

    def __init__(self, engine: NativeEngine, sequence: Sequence[int]) -> None:
        super().__init__(engine)
        self.sequence = sequence

    def propose(self, running: int, rows: SamplingRows, num_steps: int) -> Proposal:
        assert running == 1
        length = int(self.slots.lengths[0])
        ahead = torch.tensor([self.sequence[length : length + num_steps]])
        return chain(ahead, torch.ones_like(ahead, dtype=torch.bool))


class DrawingDraft(_Stub):
    """Draws each guess from a fixed random table over the token before it, the surer the larger `sure`."""

    def __init__(self, engine: NativeEngine, sure: float = 1.0) -> None:
        super().__init__(engine)
        vocab = engine.spec.vocab_size
        scores = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(5))
        self.table = (sure * scores).softmax(-1)

    def propose(self, running: int, rows: SamplingRows, num_steps: int) -> Proposal:
        before, tokens, probs = self.slots.last_tokens[:running], [], []
        for step in range(num_steps):
            q_NV = greedy_rows_certain(self.table[before], self.table[before], rows)
            numbers = uniform(substream(rows.stream, DRAFT), self.slots.lengths[:running] + step)
            before = inverse_cdf(q_NV, numbers)
            tokens.append(before)
            probs.append(q_NV)
        guesses = torch.stack(tokens, 1)
        return chain(guesses, torch.ones_like(guesses, dtype=torch.bool), torch.stack(probs, 1))
