"""The scheduler: arrival order, dense slots, shared prompts, and the copies that close holes."""

from __future__ import annotations

from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.scheduler import Scheduler, Ticket, prefix_key


def tickets(*specs: tuple[int | None, int], start: int = 0) -> list[Ticket]:
    """One ticket per (group, prompt length); the index names it."""
    made = []
    for i, (group, length) in enumerate(specs, start):
        request = GenerateRequest(
            input_ids=[7] * length,
            sampling=SamplingParams(max_new_tokens=4),
            sample_key=i,
            group=group,
        )
        made.append(Ticket(request, owner=None, index=i, prefix=prefix_key(request)))
    return made


def running(scheduler: Scheduler) -> list[int]:
    return [ticket.index for ticket in scheduler.running]


def test_a_group_is_one_admission_in_consecutive_slots() -> None:
    scheduler = Scheduler(max_running=8, max_prefill_tokens=100, max_tokens=1000)
    scheduler.submit(tickets((0, 3), (0, 3), (0, 3), (1, 3), (None, 3), (None, 3)))
    admissions = scheduler.admit(None, scheduler.max_prefill_tokens)
    assert [(a.first_slot, len(a.tickets)) for a in admissions] == [(0, 3), (3, 1), (4, 1), (5, 1)]
    assert running(scheduler) == [0, 1, 2, 3, 4, 5]


def test_the_same_group_with_another_prompt_is_not_shared() -> None:
    scheduler = Scheduler(max_running=8, max_prefill_tokens=100, max_tokens=1000)
    scheduler.submit(tickets((0, 3), (0, 4)))
    assert len(scheduler.admit(None, scheduler.max_prefill_tokens)) == 2


def test_nothing_overtakes_the_head_of_the_queue() -> None:
    scheduler = Scheduler(max_running=8, max_prefill_tokens=10, max_tokens=1000)
    scheduler.submit(tickets((0, 6), (1, 6), (2, 1)))
    assert [len(a.prompt) for a in scheduler.admit(None, scheduler.max_prefill_tokens)] == [6]
    assert [len(a.prompt) for a in scheduler.admit(None, scheduler.max_prefill_tokens)] == [6, 1]


def test_a_prompt_longer_than_a_step_is_read_first_and_nothing_overtakes_it() -> None:
    scheduler = Scheduler(max_running=8, max_prefill_tokens=4, max_tokens=1000)
    scheduler.submit(tickets((None, 9), (1, 2)))
    head = scheduler.next_to_read(None)
    assert head is scheduler.waiting[0]
    assert scheduler.admit(None, 4) == []
    assert scheduler.next_to_read(head.key) is None
    admissions = scheduler.admit(head.key, 3)
    assert [(len(a.prompt), a.held) for a in admissions] == [(9, True), (2, False)]


def test_no_prompt_is_read_ahead_of_a_free_slot() -> None:
    scheduler = Scheduler(max_running=1, max_prefill_tokens=4, max_tokens=1000)
    scheduler.submit(tickets((0, 1), (1, 9)))
    scheduler.admit(None, 4)
    assert scheduler.next_to_read(None) is None


def test_a_split_group_names_its_prompt_and_enters_without_prefill_later() -> None:
    scheduler = Scheduler(max_running=2, max_prefill_tokens=100, max_tokens=1000)
    scheduler.submit(tickets((5, 3), (5, 3), (5, 3)))
    admissions = scheduler.admit(None, scheduler.max_prefill_tokens)
    held = scheduler.split_prefix(admissions)
    assert held == (5, (7, 7, 7))
    assert scheduler.admit(held, 100) == []
    scheduler.release([0])
    (rest,) = scheduler.admit(held, 100)
    assert rest.held and rest.first_slot == 1
    assert scheduler.split_prefix([rest]) is None


def test_a_request_enters_when_there_is_room_for_its_longest_response() -> None:
    """Each may come to hold its prompt and 4 tokens."""
    scheduler = Scheduler(max_running=8, max_prefill_tokens=100, max_tokens=20)
    scheduler.submit(tickets((0, 6), (1, 5), (2, 2), (3, 1)))
    scheduler.admit(None, 100)
    assert running(scheduler) == [0, 1], "10 and 9 tokens; the third waits, and nobody overtakes it"
    scheduler.release([1])
    scheduler.admit(None, 100)
    assert running(scheduler) == [0, 2]


def test_a_long_prompt_is_not_read_before_there_is_room_for_it() -> None:
    scheduler = Scheduler(max_running=8, max_prefill_tokens=5, max_tokens=20)
    scheduler.submit(tickets((0, 4), (1, 9)))
    scheduler.admit(None, 5)
    assert scheduler.next_to_read(None) is None
    scheduler.release([0])
    assert scheduler.next_to_read(None) is scheduler.waiting[0]


def test_release_moves_survivors_from_the_end_into_the_holes() -> None:
    scheduler = Scheduler(max_running=6, max_prefill_tokens=100, max_tokens=1000)
    scheduler.submit(tickets(*[(None, 1)] * 6))
    scheduler.admit(None, scheduler.max_prefill_tokens)
    assert scheduler.release([0, 2, 4]) == [(3, 0), (5, 2)]
    assert running(scheduler) == [3, 1, 5]
    assert scheduler.release([2]) == []
    assert scheduler.release([0, 1]) == []
    assert running(scheduler) == []


def test_withdraw_takes_only_the_chosen() -> None:
    scheduler = Scheduler(max_running=2, max_prefill_tokens=100, max_tokens=1000)
    scheduler.submit(tickets((0, 1), (1, 1), (0, 1), (1, 1)))
    scheduler.admit(None, scheduler.max_prefill_tokens)
    assert [t.index for t in scheduler.withdraw(lambda t: t.request.group == 0)] == [2]
    assert [t.index for t in scheduler.waiting] == [3]
    assert scheduler.slots_of(lambda t: t.request.group == 1) == [1]
