"""Who runs in which slot: first come, first served admission into dense slots while there is room for all
that a request may become, and compaction when some finish.

Pure bookkeeping without tensors. Running requests always occupy slots 0..n-1, so that the engine decodes a
contiguous block; the plan of copies that keeps it so is returned to the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from miles.rollout.engine import GenerateRequest, WeightSpan

PrefixKey = tuple[int, tuple[int, ...]]
"""(group, prompt ids): requests with the same key share one prefill."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way through the engine. `owner` and `index` say whose answer it is; `stop_string` is
    what ended the response, where a text did."""

    request: GenerateRequest
    owner: object
    index: int
    prefix: PrefixKey | None
    weight_versions: list[WeightSpan] = field(default_factory=list)
    cached_tokens: int = 0
    stop_string: str | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.request.input_ids)

    @property
    def most_tokens(self) -> int:
        """Tokens that it may come to hold."""
        return self.prompt_length + self.request.sampling.max_new_tokens

    @property
    def key(self) -> object:
        """What its prompt is kept under: a request that shares nothing has a key of its own."""
        return self if self.prefix is None else self.prefix


def prefix_key(request: GenerateRequest) -> PrefixKey | None:
    """What a request shares its prompt under; None when it shares nothing."""
    return None if request.group is None else (request.group, tuple(request.input_ids))


@dataclass(frozen=True, slots=True)
class Admission:
    """Tickets with one prompt and the consecutive slots, from `first_slot` on, that they enter."""

    tickets: list[Ticket]
    first_slot: int
    held: bool
    """The prompt is the one that the engine holds from before: nothing to compute."""

    @property
    def slots(self) -> range:
        return range(self.first_slot, self.first_slot + len(self.tickets))

    @property
    def prompt(self) -> Sequence[int]:
        return self.tickets[0].request.input_ids


class Scheduler:
    """Queue and slots.

    A request enters when there is a slot, and room for its prompt and its longest response beside the longest
    of everybody who runs: at most `max_tokens` together. So nobody who runs is ever sent back.

    Admission is in arrival order and never overtakes. So at most one prompt at a time is admitted in part,
    the one at the head of the queue; `split_prefix` names it, and the engine holds on to it until the rest
    came in. Nor does anything enter while a prompt longer than `max_prefill_tokens` is at the head, until it
    was read chunk by chunk (`next_to_read`) and is held.
    """

    def __init__(self, max_running: int, max_prefill_tokens: int, max_tokens: int) -> None:
        self.max_running = max_running
        self.max_prefill_tokens = max_prefill_tokens
        self.max_tokens = max_tokens
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []

    def submit(self, tickets: Sequence[Ticket]) -> None:
        self.waiting.extend(tickets)

    def may_admit(self) -> bool:
        """Whether the head of the queue could enter now."""
        return bool(self.waiting) and self._has_room(self._reserved())

    def next_to_read(self, held: object) -> Ticket | None:
        """The head of the queue, when it may enter and its prompt has to be read in chunks first."""
        if not self.may_admit():
            return None
        head = self.waiting[0]
        return head if head.prompt_length > self.max_prefill_tokens and head.key != held else None

    def admit(self, held: object, budget: int) -> list[Admission]:
        """Move waiting tickets into free slots, one Admission per distinct consecutive prompt.

        Args:
            held: the key of the prompt that the engine holds; None for none.
            budget: prompt tokens that may be computed.
        """
        admissions: list[Admission] = []
        reserved, last = self._reserved(), object()
        while self.waiting and self._has_room(reserved):
            ticket = self.waiting[0]
            key = ticket.key
            if key == last:
                admissions[-1].tickets.append(ticket)
            else:
                is_held = key == held
                cost = 0 if is_held else ticket.prompt_length
                if cost > budget:
                    break
                budget -= cost
                admissions.append(Admission([ticket], len(self.running), is_held))
                last = key
            reserved += ticket.most_tokens
            self.running.append(self.waiting.popleft())
        return admissions

    def _reserved(self) -> int:
        return sum(ticket.most_tokens for ticket in self.running) if self.waiting else 0

    def _has_room(self, reserved: int) -> bool:
        """Whether the head of the queue may enter beside requests that may hold `reserved` tokens."""
        fits = reserved + self.waiting[0].most_tokens <= self.max_tokens
        return fits and len(self.running) < self.max_running

    def split_prefix(self, admissions: Sequence[Admission]) -> object:
        """The key of the last admission, when the head of the queue has the same one; else None."""
        if not admissions or not self.waiting:
            return None
        key = admissions[-1].tickets[0].key
        return key if key == self.waiting[0].key else None

    def release(self, slots: Sequence[int]) -> list[tuple[int, int]]:
        """Free these slots (ascending); returns the (source, destination) moves that close the holes."""
        remaining = len(self.running) - len(slots)
        freed = set(slots)
        movers = (slot for slot in range(remaining, len(self.running)) if slot not in freed)
        moves = list(zip(movers, (slot for slot in slots if slot < remaining), strict=True))
        for source, destination in moves:
            self.running[destination] = self.running[source]
        del self.running[remaining:]
        return moves

    def withdraw(self, chosen: Callable[[Ticket], bool]) -> list[Ticket]:
        """Take the chosen waiting tickets out of the queue."""
        withdrawn = [ticket for ticket in self.waiting if chosen(ticket)]
        self.waiting = deque(ticket for ticket in self.waiting if not chosen(ticket))
        return withdrawn

    def slots_of(self, chosen: Callable[[Ticket], bool]) -> list[int]:
        """Ascending slots of the chosen running tickets."""
        return [slot for slot, ticket in enumerate(self.running) if chosen(ticket)]
