"""What the engine knows about each running request, as tensors over slots; nothing here is per-token Python.

Shapes: S slots, C context length, Lm MoE layers, k experts per token, n running requests in slots 0..n-1.
Columns of the [S, C] buffers are positions in the sequence. Prompt tokens are stored for a draft only
(`store_prompt`); the routes of row t are those of the token at position t.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from miles.data.sample import SpecInfo
from miles.rollout.native.keyed_random import streams
from miles.rollout.native.sampler import NO_TOKEN, NO_TOP_K, NO_TOP_P, SamplingRows
from miles.rollout.native.scheduler import Ticket


class Slots:
    """Preallocated state of `num_slots` running requests, `num_depths` deep speculation included.

    `lengths` counts prompt and sampled tokens; the last one of them has not been through the decoder yet.
    """

    def __init__(
        self,
        num_slots: int,
        context_length: int,
        routes_shape: tuple[int, int] | None,
        device: torch.device,
        num_depths: int = 0,
    ) -> None:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.context_length = context_length
        self.lengths = ints(num_slots)
        self.limits = ints(num_slots)
        self.last_tokens = ints(num_slots)
        self.stream = ints(num_slots)
        self.temperature = torch.ones(num_slots, device=device)
        self.greedy = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.top_k = ints(num_slots)
        self.top_p = torch.zeros(num_slots, dtype=torch.float64, device=device)
        self.min_length = ints(num_slots)
        self.stop_ids = torch.full((num_slots, 1), NO_TOKEN, dtype=torch.int64, device=device)
        # Buffers are not zeroed: pages that no request reaches are never touched.
        self.tokens = torch.empty((num_slots, context_length), dtype=torch.int64, device=device)
        self.log_probs = torch.empty((num_slots, context_length), dtype=torch.float32, device=device)
        self.routes = (
            None
            if routes_shape is None
            else torch.empty((num_slots, context_length, *routes_shape), dtype=torch.int16, device=device)
        )
        self.draft_steps = ints(num_slots)
        # Verifications, drafted tokens, accepted tokens; then by depth: guesses tried and accepted.
        self.spec_totals = ints(num_slots, 3)
        self.spec_tried, self.spec_accepted = ints(num_slots, num_depths), ints(num_slots, num_depths)
        self._depths = torch.arange(num_depths, device=device)
        self._row_start = torch.arange(num_slots, device=device) * context_length

    def enter(self, first_slot: int, tickets: Sequence[Ticket], seed: int) -> None:
        """Set the parameters of newly admitted requests in slots first_slot, first_slot + 1, …"""
        into = slice(first_slot, first_slot + len(tickets))
        params = [ticket.request.sampling for ticket in tickets]
        if all(p is params[0] for p in params):
            params = params[:1]  # one value for the whole column
        prompt_lengths = np.array([ticket.prompt_length for ticket in tickets])
        min_new_tokens = np.array([p.min_new_tokens for p in params])
        keys = torch.tensor([ticket.request.sample_key for ticket in tickets], device=self.stream.device)
        self.stream[into] = streams(seed, keys)
        columns = (
            (self.lengths, prompt_lengths),
            (self.limits, prompt_lengths + [p.max_new_tokens for p in params]),
            (self.min_length, np.where(min_new_tokens > 0, prompt_lengths + min_new_tokens, 0)),
            (self.temperature, np.array([1.0 if p.greedy else p.temperature for p in params])),
            (self.greedy, np.array([p.greedy for p in params])),
            (self.top_k, np.array([NO_TOP_K if p.top_k == -1 else p.top_k for p in params])),
            (self.top_p, np.array([NO_TOP_P if p.top_p == 1 else p.top_p for p in params])),
        )
        for column, values in columns:
            column[into] = torch.from_numpy(values)
        self._set_stop_ids(into, [p.stop_token_ids for p in params])
        num_depths = len(self._depths)
        asked = [ticket.request.speculative_num_steps for ticket in tickets]
        steps = [num_depths if steps is None else min(steps, num_depths) for steps in asked]
        self.draft_steps[into] = torch.tensor(steps, device=self.stream.device)
        for counters in (self.spec_totals, self.spec_tried, self.spec_accepted):
            counters[into] = 0

    def store_prompt(self, first: int, stop: int, prompt: Sequence[int]) -> None:
        """Store the prompt of slots first..stop-1 before its response."""
        self.tokens[first:stop, : len(prompt)] = torch.tensor(prompt, device=self.tokens.device)

    def _set_stop_ids(self, into: slice, stop_ids: list[tuple[int, ...]]) -> None:
        width = max(len(ids) for ids in stop_ids)
        if width > self.stop_ids.shape[1]:
            wider = self.stop_ids.new_full((len(self.stop_ids), width), NO_TOKEN)
            wider[:, : self.stop_ids.shape[1]] = self.stop_ids
            self.stop_ids = wider
        padding = (NO_TOKEN,) * self.stop_ids.shape[1]
        padded = np.array([(ids + padding)[: len(padding)] for ids in stop_ids])
        self.stop_ids[into] = torch.from_numpy(padded)

    def sampling_rows(self, first: int, stop: int) -> SamplingRows:
        """The sampling parameters of slots first..stop-1, as views."""
        span = slice(first, stop)
        temperature, greedy = self.temperature[span], self.greedy[span]
        top_k, top_p = self.top_k[span], self.top_p[span]
        return SamplingRows(
            stream=self.stream[span],
            temperature=temperature,
            greedy=greedy,
            top_k=top_k,
            top_p=top_p,
            min_length=self.min_length[span],
            stop_ids=self.stop_ids[span],
            any_temperature=bool((temperature != 1).any()),
            any_greedy=bool(greedy.any()),
            any_truncated=bool(((top_k != NO_TOP_K) | (top_p != NO_TOP_P)).any()),
            any_min_length=bool(self.min_length[span].any()),
        )

    def append(self, first: int, ids_N: torch.Tensor, log_probs_N: torch.Tensor) -> torch.Tensor:
        """Store one sampled token for each slot from `first` on; returns which requests are done, bool
        [N]."""
        span = slice(first, first + len(ids_N))
        lengths_N = self.lengths[span]
        at_N = self._row_start[span] + lengths_N
        self.tokens.view(-1).index_copy_(0, at_N, ids_N)
        self.log_probs.view(-1).index_copy_(0, at_N, log_probs_N)
        self.last_tokens[span] = ids_N
        lengths_N += 1
        return (lengths_N >= self.limits[span]) | (ids_N[:, None] == self.stop_ids[span]).any(dim=1)

    def append_run(
        self, ids_NP: torch.Tensor, log_probs_NP: torch.Tensor, counts_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the first `counts_N` tokens of each row, up to the first stop id, for slots 0..n-1.

        Returns how many were stored, int64 [n], and which requests are done, bool [n].
        """
        num = len(ids_NP)
        steps_P = torch.arange(ids_NP.shape[1], device=ids_NP.device)
        stops_NP = (ids_NP[:, :, None] == self.stop_ids[:num, None]).any(dim=2)
        stops_NP &= steps_P < counts_N[:, None]
        stopped_N = stops_NP.any(dim=1)
        counts_N = torch.where(stopped_N, stops_NP.to(torch.uint8).argmax(dim=1) + 1, counts_N)
        slot_M, step_M = (steps_P < counts_N[:, None]).nonzero(as_tuple=True)
        at_M = self._row_start[slot_M] + self.lengths[slot_M] + step_M
        self.tokens.view(-1).index_copy_(0, at_M, ids_NP[slot_M, step_M])
        self.log_probs.view(-1).index_copy_(0, at_M, log_probs_NP[slot_M, step_M])
        self.last_tokens[:num] = ids_NP.gather(1, counts_N[:, None] - 1).squeeze(1)
        self.lengths[:num] += counts_N
        assert bool((self.lengths[:num] <= self.limits[:num]).all()), "a run beyond max_new_tokens"
        return counts_N, stopped_N | (self.lengths[:num] >= self.limits[:num])

    def count_speculation(
        self, drafted_N: torch.Tensor, accepted_N: torch.Tensor, tried_N: torch.Tensor
    ) -> None:
        """Add one verification of slots 0..n-1: guesses made, guesses that stand, depths that were judged."""
        num = len(drafted_N)
        self.spec_totals[:num] += torch.stack((torch.ones_like(drafted_N), drafted_N, accepted_N), 1)
        self.spec_tried[:num] += self._depths < tried_N[:, None]
        self.spec_accepted[:num] += self._depths < accepted_N[:, None]

    def record_routes(
        self, slots_M: torch.Tensor, positions_M: torch.Tensor, routes_MLk: torch.Tensor
    ) -> None:
        """Store the routes of tokens at (slot, position), int16 [M, Lm, k]."""
        assert self.routes is not None
        at_M = self._row_start[slots_M] + positions_M
        self.routes.view(-1, *routes_MLk.shape[1:]).index_copy_(0, at_M, routes_MLk)

    def record_decode_routes(self, routes_NLk: torch.Tensor) -> None:
        """Store the routes of the last tokens of slots 0..n-1, int16 [n, Lm, k]."""
        assert self.routes is not None
        num = len(routes_NLk)
        at_N = self._row_start[:num] + self.lengths[:num] - 1
        self.routes.view(-1, *routes_NLk.shape[1:]).index_copy_(0, at_N, routes_NLk)

    def record_prompt_routes(self, first: int, stop: int, routes_PLk: torch.Tensor) -> None:
        """Store the routes of a prompt of P tokens for slots first..stop-1."""
        assert self.routes is not None
        self.routes[first:stop, : len(routes_PLk)] = routes_PLk

    def move(self, sources: Sequence[int], destinations: Sequence[int], length: int) -> None:
        """Copy slots; no slot is both source and destination. `length` bounds the sequences that move."""
        source, destination = (torch.tensor(s, device=self.stream.device) for s in (sources, destinations))
        columns = [
            self.lengths,
            self.limits,
            self.last_tokens,
            self.stream,
            self.temperature,
            self.greedy,
            self.top_k,
            self.top_p,
            self.min_length,
            self.stop_ids,
        ]
        if len(self._depths):
            columns += [self.draft_steps, self.spec_totals, self.spec_tried, self.spec_accepted]
        for column in columns:
            column.index_copy_(0, destination, column.index_select(0, source))
        for buffer in (self.tokens, self.log_probs, self.routes):
            if buffer is not None:
                used = buffer[:, :length]
                used.index_copy_(0, destination, used.index_select(0, source))

    def read(self, slots: Sequence[int]) -> list[tuple[list[int], np.ndarray, np.ndarray | None]]:
        """Tokens, log_probs [length] and routes [length, Lm, k] of each slot, valid from the response on; the
        routes from the prompt on, for all tokens that went through the decoder. Arrays are views of a copy
        that holds these slots and no more.
        """
        index = torch.tensor(slots, device=self.stream.device)
        lengths = self.lengths.index_select(0, index)
        ends = list(accumulate(lengths.tolist(), initial=0))
        inside = torch.arange(int(lengths.max()), device=index.device) < lengths[:, None]

        def rows(buffer: torch.Tensor) -> np.ndarray:
            return buffer[:, : inside.shape[1]].index_select(0, index)[inside].cpu().numpy()

        tokens, log_probs = rows(self.tokens).tolist(), rows(self.log_probs)
        routes = None if self.routes is None else rows(self.routes)
        return [
            (tokens[start:end], log_probs[start:end], None if routes is None else routes[start:end])
            for start, end in pairwise(ends)
        ]

    def read_speculation(self, slots: Sequence[int]) -> list[SpecInfo | None]:
        """The counters of each slot; None where nothing was to be guessed."""
        if not len(self._depths):
            return [None] * len(slots)
        index = torch.tensor(slots, device=self.stream.device)
        columns = (self.draft_steps, self.spec_totals, self.spec_tried, self.spec_accepted)
        rows = zip(*(column.index_select(0, index).tolist() for column in columns), strict=True)
        return [
            SpecInfo(accepted, drafted, steps, tried[:depths], by_depth[:depths]) if depths else None
            for depths, (steps, drafted, accepted), tried, by_depth in rows
        ]
