"""A draft with weights (MTP layers, EAGLE, EAGLE-3): it reads what the policy computed and guesses a chain
of tokens, or a tree.

Row t of the draft takes the policy's states of token t and the token t + 1, and says what comes after; going
deeper it takes its own features in place of the hidden state. It has a cache of its own: row t
of a request in column t, guesses behind, to be overwritten by true rows. Of several MTP layers the first one
guesses, again and again.

Shapes: n running requests in slots 0..n-1, R rows that wait to be read, W tokens that one step can add, D
hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from itertools import chain as flatten

import torch
from torch import Tensor

from miles.models.attention import Attention
from miles.models.eagle import DraftModel
from miles.models.kv_cache import KVCache
from miles.models.mtp import draft_arch
from miles.models.tree_attention import TreeNodes
from miles.rollout.native.beams import Beams
from miles.rollout.native.draft import SlotState, SpeculationSettings
from miles.rollout.native.draft_tree import Proposal, chain
from miles.rollout.native.keyed_random import DRAFT, substream, uniform
from miles.rollout.native.runner import Runner
from miles.rollout.native.sampler import Distribution, SamplingRows, distribution, inverse_cdf
from miles.rollout.native.slots import Slots
from miles.rollout.native.verify import greedy_rows_certain


class WaitingRows:
    """Hidden states of tokens that the policy has read and the draft has not: [slots, R, D], the first
    `counts` of each slot. They belong to the last tokens but one of the request."""

    def __init__(self, num_slots: int, width: int, hidden_size: int, like: Tensor) -> None:
        self.hidden = like.new_zeros(num_slots, width, hidden_size)
        self.counts = torch.zeros(num_slots, dtype=torch.int64, device=like.device)

    def put(self, first: int, counts: Tensor, hidden: Tensor) -> None:
        """Wait with hidden [n, W, D] for slots first, first + 1, …; nothing else waits there."""
        span = slice(first, first + len(counts))
        self.hidden[span, : hidden.shape[1]] = hidden
        self.counts[span] = counts

    def copy_slot(self, source: int, destinations: list[int], length: int) -> None:
        self.hidden[destinations] = self.hidden[source].clone()
        self.counts[destinations] = self.counts[source].clone()

    def move_slots(self, sources: list[int], destinations: list[int], length: int) -> None:
        self.hidden[destinations] = self.hidden[sources]
        self.counts[destinations] = self.counts[sources]


class ModelDraft:
    """The draft of the native engine (protocol: `draft.Draft`) over the weights that `runner.draft` holds.

    Where requests sample, a chain is drawn from the draft at their own sampling parameters; greedy requests
    and trees get its most likely tokens.
    """

    reads_hidden = True

    def __init__(self, runner: Runner, slots: Slots, settings: SpeculationSettings) -> None:
        cache, spec = runner.cache, runner.spec
        draft = runner.draft
        arch = draft_arch(spec) if draft is None else draft.arch
        num_read = 1 if draft is None else len(draft.taps) or 1
        self._runner, self._slots, self._settings = runner, slots, settings
        columns = slots.context_length + settings.num_steps * settings.eagle_topk
        self._cache = KVCache(
            arch,
            cache.num_slots,
            runner.numerics.cache_length(columns),
            cache.keys.dtype,
            runner.device,
        )
        # Of several MTP layers the deeper ones would need rows of their own, which nobody keeps up.
        self._deeper = 1 if len(arch.layers) == 1 else 0
        width = num_read * spec.hidden_size
        self._waiting = WaitingRows(cache.num_slots, settings.num_steps + 1, width, cache.keys)
        self.state: Sequence[SlotState] = (self._cache, self._waiting)

    def read_prompts(
        self, prompts: Sequence[Sequence[int]], slots: Sequence[int], hidden: Sequence[Tensor]
    ) -> None:
        """All rows but the last, whose next token is not drawn yet."""
        for slot, states in zip(slots, hidden, strict=True):
            self._waiting.put(slot, self._slots.lengths.new_ones(1), states[None, -1:])
        longer = [i for i, prompt in enumerate(prompts) if len(prompt) > 1]
        if not longer:
            return
        lengths = [len(prompts[i]) - 1 for i in longer]
        device = self._runner.device
        tokens = torch.tensor(list(flatten.from_iterable(prompts[i][1:] for i in longer)), device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        attention = self._runner.numerics.packed_attention(
            torch.tensor([0, *accumulate(lengths)], device=device),
            self._cache,
            torch.tensor([slots[i] for i in longer], device=device),
        )
        self._read(torch.cat([hidden[i][:-1] for i in longer]), tokens, positions, attention)

    def grew(self, first: int, counts: Tensor, hidden: Tensor | None) -> None:
        assert hidden is not None
        self._waiting.put(first, counts, hidden)

    def propose(self, running: int, rows: SamplingRows, num_steps: int) -> Proposal:
        features = self._read_waiting(running)
        if self._settings.eagle_topk > 1:
            return self._tree(features, rows, num_steps)
        return self._chain(features, rows, num_steps)

    @property
    def _draft(self) -> DraftModel:
        assert self._runner.draft is not None, "the draft has weights before there are requests"
        return self._runner.draft

    def _read(
        self, hidden: Tensor, tokens: Tensor, positions: Tensor, attention: Attention, depth: int = 0
    ) -> Tensor:
        """Features [T, D] of rows that hold what the policy computed (depth 0), or features."""
        assert self._runner.decoder is not None
        return self._draft(hidden, tokens, positions, attention, self._runner.decoder, depth)

    def _expect(self, features: Tensor, rows: SamplingRows, positions: Tensor) -> Distribution:
        """What the draft expects at `positions` [N], under the sampling parameters of the requests."""
        assert self._runner.decoder is not None
        return distribution(self._draft.logits(features, self._runner.decoder), rows, positions)

    def _read_waiting(self, running: int) -> Tensor:
        """Read what the policy has read since, as chains behind what the cache holds; the features of the
        last row of each request [n, D]."""
        slots = self._slots
        lengths, counts = slots.lengths[:running], self._waiting.counts[:running]
        width = int(counts.max())
        steps = torch.arange(width, device=lengths.device)
        slot, step = (steps < counts.unsqueeze(1)).nonzero(as_tuple=True)
        prefix = lengths - 1 - counts
        ancestors = torch.ones(width, width, dtype=torch.bool, device=lengths.device).tril_()
        nodes = TreeNodes(slot, step, step, prefix, ancestors.expand(running, -1, -1), is_chain=True)
        tokens = slots.tokens[slot, nodes.positions + 1]
        attention = self._runner.numerics.tree_attention(self._cache, nodes)
        features = self._read(self._waiting.hidden[slot, step], tokens, nodes.positions, attention)
        return features[counts.cumsum(0) - 1]

    def _chain(self, features: Tensor, rows: SamplingRows, num_steps: int) -> Proposal:
        """Each guess is drawn from what the draft expects; of greedy requests it is the likeliest token."""
        lengths = self._slots.lengths[: len(features)]
        stream = substream(rows.stream, DRAFT)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        for step in range(num_steps):
            if step:
                positions = lengths - 2 + step
                attention = self._runner.numerics.cached_attention(self._cache, positions)
                features = self._read(features, tokens[-1], positions, attention, self._deeper)
            expected = self._expect(features, rows, lengths + step)
            probs.append(greedy_rows_certain(expected.probs, expected.allowed, rows))
            tokens.append(inverse_cdf(probs[-1], uniform(stream, lengths + step)))
        guesses = torch.stack(tokens, 1)
        return chain(guesses, torch.ones_like(guesses, dtype=torch.bool), torch.stack(probs, 1))

    def _tree(self, features: Tensor, rows: SamplingRows, num_steps: int) -> Proposal:
        """The branches that the draft believes in most, at each depth."""
        num = len(features)
        lengths = self._slots.lengths[:num]
        beams = Beams.start(self._expect(features, rows, lengths).probs, self._settings.eagle_topk)
        branches = beams.tokens.shape[1]
        features = features.repeat_interleave(branches, 0)
        beam_rows = rows.take(torch.arange(num, device=lengths.device).repeat_interleave(branches))
        for step in range(1, num_steps):
            nodes = beams.newest(lengths - 1)
            attention = self._runner.numerics.tree_attention(self._cache, nodes)
            guesses = beams.tokens.flatten()
            features = self._read(features, guesses, nodes.positions, attention, self._deeper)
            positions = (lengths + step).repeat_interleave(branches)
            features = features[beams.grow(self._expect(features, beam_rows, positions).probs)]
        return beams.best(self._settings.num_draft_tokens - 1)
