"""Speculative decoding: guess ahead, read all guesses in one forward, keep what stands.

The policy's log-probs and routes of what is kept are those of plain decoding, and so is the distribution
(`verify`). What falls leaves keys and values behind that the next tokens overwrite.

Shapes: n running requests in slots 0..n-1, W most guesses of one, T nodes (a last token each, and guesses), V
vocabulary, Lm MoE layers, k experts per token, D hidden.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from miles.models.logprob import CHUNK_ELEMENTS
from miles.models.tree_attention import TreeNodes
from miles.rollout.native.break_even import BreakEven
from miles.rollout.native.draft import Draft, SpeculationSettings
from miles.rollout.native.draft_tree import Proposal, no_guesses
from miles.rollout.native.keyed_random import uniform
from miles.rollout.native.model_draft import ModelDraft
from miles.rollout.native.ngram import NgramDraft
from miles.rollout.native.runner import Runner
from miles.rollout.native.sampler import SamplingRows, distribution, draw, sample
from miles.rollout.native.slots import Slots
from miles.rollout.native.stop_strings import StopStrings
from miles.rollout.native.verify import Verdict, matching, rejection


@dataclass(frozen=True)
class Grown:
    """New tokens of slots 0..n-1: ids int64 [n, W'], log-probs float32 [n, W'], of which the first `counts`
    (int64 [n], at least 1) are real; `done` bool [n]."""

    ids: Tensor
    log_probs: Tensor
    counts: Tensor
    done: Tensor


class Speculation:
    """One step of decoding for a batch, several tokens at a time."""

    def __init__(
        self,
        runner: Runner,
        slots: Slots,
        stop_strings: StopStrings,
        settings: SpeculationSettings,
        draft: Draft,
    ) -> None:
        self.settings, self.draft = settings, draft
        self._stop_strings = stop_strings
        self.break_even = BreakEven()
        self._runner, self._slots = runner, slots
        # Processor time where the processor does the work: other programs of the machine do not count.
        self._clock = time.process_time if runner.device.type == "cpu" else time.perf_counter

    def step(self, running: int, rows: SamplingRows) -> Grown:
        """Add at least one token to every running request; raises nothing for non-finite logits: the
        log-probs show them."""
        started = self._clock()
        proposal = self._propose(running, rows)
        if not proposal.tokens.shape[1] and not self.draft.reads_hidden:
            return self._plain(running, rows)
        guessed = self._clock()
        if self.break_even.due():
            self._time_plain(running, rows)
        verifying = self._clock()
        verdict, read = self._verify(proposal, running, rows)
        grown = self._store(verdict, proposal, read)
        seconds = guessed - started + self._clock() - verifying
        self.break_even.speculated(int(grown.counts.sum()), seconds)
        return grown

    def _propose(self, running: int, rows: SamplingRows) -> Proposal:
        """Guesses within what each request still may say and how far it wants to guess."""
        slots = self._slots
        room = slots.limits[:running] - slots.lengths[:running] - 1
        room = torch.minimum(room, slots.draft_steps[:running])
        depth = min(int(room.max()), self.settings.num_steps)
        if depth < 1:
            return no_guesses(running, rows.stream.device)
        return self.draft.propose(running, rows, depth).within(room)

    def _plain(self, running: int, rows: SamplingRows) -> Grown:
        """Nobody has a guess: one token each."""
        slots = self._slots
        ids, log_probs = self._decode(running, rows, keep_routes=True)
        counts = torch.ones_like(ids)
        counts, done = self._stop_strings.cut(0, counts, slots.append(0, ids, log_probs))
        slots.count_speculation(*(torch.zeros_like(ids),) * 3)
        self.draft.grew(0, counts, None)
        return Grown(ids[:, None], log_probs[:, None], counts, done)

    def _decode(self, running: int, rows: SamplingRows, keep_routes: bool) -> tuple[Tensor, Tensor]:
        slots = self._slots
        logits, routes = self._runner.decode(slots.last_tokens[:running], slots.lengths[:running] - 1)
        if routes is not None and keep_routes:
            slots.record_decode_routes(routes)
        return sample(logits, rows, slots.lengths[:running])

    def _time_plain(self, running: int, rows: SamplingRows) -> None:
        """A plain step whose token is thrown away: what it costs, at this batch, to go without a draft."""
        started = self._clock()
        self._decode(running, rows, keep_routes=False)
        self.break_even.plain(running, self._clock() - started)

    def _verify(self, proposal: Proposal, running: int, rows: SamplingRows) -> tuple[Verdict, Tensor | None]:
        """Read the guesses, judge them, and put routes and keys of what stands in their places."""
        slots, width = self._slots, proposal.tokens.shape[1]
        nodes = proposal.nodes(slots.lengths[:running] - 1)
        tokens = torch.cat((slots.last_tokens[:running, None], proposal.tokens), 1)
        states = self._runner.read_nodes(tokens[nodes.slots, nodes.nodes], nodes)
        # The flat place of each node in a grid [n, W + 1]; cells without a node name one that nobody reads.
        cells = torch.zeros(running * (width + 1), dtype=torch.int64, device=tokens.device)
        cells[nodes.cells] = torch.arange(len(nodes.cells), device=tokens.device)
        cells = cells.view(running, width + 1)
        verdict = self._judge(states.hidden, cells, proposal, rows)
        self._keep_path(verdict, nodes, cells, states.routes)
        return verdict, states.read[cells.gather(1, verdict.path)] if self.draft.reads_hidden else None

    def _judge(self, hidden: Tensor, cells: Tensor, proposal: Proposal, rows: SamplingRows) -> Verdict:
        """In parts of whole requests, so that the probabilities of few nodes exist at once."""
        num, per_request = cells.shape
        part = max(1, CHUNK_ELEMENTS // (per_request * self._runner.spec.vocab_size))
        lengths = self._slots.lengths[:num]
        if num <= part:
            return self._judge_part(hidden[cells.flatten()], proposal, rows, lengths)
        verdicts = [
            self._judge_part(
                hidden[cells[index].flatten()], proposal.take(index), rows.take(index), lengths[index]
            )
            for index in torch.arange(num, device=cells.device).split(part)
        ]
        return Verdict.joined(verdicts)

    def _judge_part(self, hidden: Tensor, proposal: Proposal, rows: SamplingRows, lengths: Tensor) -> Verdict:
        num, width = proposal.tokens.shape
        depths = torch.cat((proposal.depths.new_zeros(num, 1), proposal.depths), 1)
        positions = (lengths.unsqueeze(1) + depths).flatten()
        node_rows = rows.take(torch.arange(num, device=lengths.device).repeat_interleave(width + 1))
        target = distribution(self._runner.logits(hidden), node_rows, positions)
        if proposal.probs is not None:
            return rejection(target, node_rows, proposal, rows, lengths)
        ids = draw(target, node_rows, uniform(node_rows.stream, positions))
        log_probs = target.log_probs.gather(1, ids[:, None]).view(num, -1)
        return matching(ids.view(num, -1), log_probs, proposal)

    def _keep_path(self, verdict: Verdict, nodes: TreeNodes, cells: Tensor, routes: Tensor | None) -> None:
        """Routes of the nodes that stand, and in a tree their keys, which lie at the node's number."""
        steps = torch.arange(verdict.path.shape[1], device=cells.device)
        slot, depth = (steps < verdict.counts.unsqueeze(1)).nonzero(as_tuple=True)
        node = verdict.path[slot, depth]
        positions = nodes.prefix[slot] + depth
        if routes is not None:
            self._slots.record_routes(slot, positions, routes[cells[slot, node]])
        if not nodes.is_chain:
            moved = node != depth
            slot, prefix = slot[moved], nodes.prefix[slot[moved]]
            cache = self._runner.cache
            cache.move_rows(cache.rows(slot, prefix + node[moved]), cache.rows(slot, prefix + depth[moved]))

    def _store(self, verdict: Verdict, proposal: Proposal, read: Tensor | None) -> Grown:
        """Append what stands up to the first stop id or stop string, and count."""
        slots = self._slots
        standing = verdict.counts - 1
        counts, done = slots.append_run(verdict.ids, verdict.log_probs, verdict.counts)
        counts, done = self._stop_strings.cut(0, counts, done)
        # The last token of a run is the policy's own, unless a guess ended the response before it.
        accepted = torch.minimum(standing, counts)
        tried = accepted + (verdict.fell & (counts > standing))
        slots.count_speculation(proposal.valid.sum(1), accepted, tried)
        self.draft.grew(0, counts, read)
        return Grown(verdict.ids, verdict.log_probs, counts, done)


def speculate(
    runner: Runner, slots: Slots, stop_strings: StopStrings, settings: SpeculationSettings
) -> Speculation:
    """Speculative decoding with the draft that the settings name."""
    draft: Draft
    if settings.algorithm == "NGRAM":
        draft = NgramDraft(slots, settings.eagle_topk, settings.num_draft_tokens - 1)
    else:
        draft = ModelDraft(runner, slots, settings)
    return Speculation(runner, slots, stop_strings, settings, draft)
