"""Responses that end with a text: after every step, the end of what a request said is read and searched.

Nothing is read while no running request has a stop string. Shapes: N slots from `first` on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from miles.rollout.native.scheduler import Scheduler, Ticket
from miles.rollout.native.slots import Slots

Decode = Callable[[Sequence[int]], str]
"""Ids to text, special tokens included."""


class StopStrings:
    """What the running requests stop at, looked for in what they said since the last look."""

    def __init__(self, scheduler: Scheduler, slots: Slots, decode: Decode | None) -> None:
        self._scheduler, self._slots, self._decode = scheduler, slots, decode
        self._watched: list[int] | None = None

    def forget(self) -> None:
        """The running requests are others now, or in other slots."""
        self._watched = None

    def cut(
        self, first: int, counts_N: torch.Tensor, done_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """End each response that says a stop string by now at the token that completed it.

        Args:
            counts_N: tokens that the slots grew by, int64 [N]; fewer come back where some were cut.
            done_N: who is complete, bool [N]; comes back with those that are now.
        """
        chosen = [slot for slot in self._watching() if first <= slot < first + len(counts_N)]
        if not chosen:
            return counts_N, done_N
        counts_N, done_N = counts_N.clone(), done_N.clone()
        counts = counts_N.tolist()
        for slot, window in zip(chosen, self._windows(chosen, first, counts), strict=True):
            ticket, grown = self._scheduler.running[slot], counts[slot - first]
            match = self._first_match(window, grown, ticket.request.sampling.stop)
            if match is not None:
                kept, ticket.stop_string = match
                self._slots.lengths[slot] -= grown - kept
                counts_N[slot - first] = kept
                done_N[slot - first] = True
        return counts_N, done_N

    def _watching(self) -> list[int]:
        """Slots of the requests that have stop strings."""
        if self._watched is None:
            running = self._scheduler.running
            self._watched = [slot for slot, ticket in enumerate(running) if ticket.request.sampling.stop]
        return self._watched

    def _windows(self, chosen: list[int], first: int, counts: list[int]) -> list[list[int]]:
        """The last ids of each chosen request: those of its last step, and before them as many as a stop
        string can have begun in."""
        slots, tickets = self._slots, [self._scheduler.running[slot] for slot in chosen]
        index = torch.tensor(chosen, device=slots.lengths.device)
        ends = slots.lengths[index].tolist()
        starts = [
            max(_start(ticket), end - counts[slot - first] - _reach(ticket.request.sampling.stop))
            for slot, ticket, end in zip(chosen, tickets, ends, strict=True)
        ]
        # A request's own ids are at hand; the tokens are fetched once for all.
        sampled = [max(start, ticket.prompt_length) for start, ticket in zip(starts, tickets, strict=True)]
        width = max(end - start for start, end in zip(sampled, ends, strict=True))
        steps = torch.arange(width, device=index.device)
        columns = (torch.tensor(sampled, device=index.device)[:, None] + steps).clamp(
            max=slots.context_length - 1
        )
        rows = slots.tokens[index[:, None], columns].tolist()
        return [
            [*ticket.request.input_ids[start : ticket.prompt_length], *row[: end - begin]]
            for ticket, start, begin, end, row in zip(tickets, starts, sampled, ends, rows, strict=True)
        ]

    def _first_match(self, window: list[int], grown: int, stop: tuple[str, ...]) -> tuple[int, str] | None:
        """How many of the last `grown` ids are kept, and the string that is complete with them."""
        assert self._decode is not None, "an engine without a tokenizer refuses stop strings"
        if not _held(self._decode(window), stop):
            return None
        before = len(window) - grown
        for kept in range(1, grown + 1):
            held = _held(self._decode(window[: before + kept]), stop)
            if held:
                return kept, held[0]
        return None


def _start(ticket: Ticket) -> int:
    """Where the response begins, its part of an earlier request included."""
    return ticket.prompt_length - ticket.request.response_so_far


@cache
def _reach(stop: tuple[str, ...]) -> int:
    """Tokens before a step that can matter: a token says a byte or more. One more stands in front, because
    some tokenizers say the first token of a text without its space."""
    return max(len(string.encode()) for string in stop)


def _held(text: str, stop: tuple[str, ...]) -> list[str]:
    return [string for string in stop if string in text]
