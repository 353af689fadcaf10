"""Continuous batching: one step admits what fits, prefills it, decodes one token for everybody, and hands out
what is complete.

Synchronous; the engine around it owns time and callers. Shapes as in `slots`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from miles.data.sample import SpecInfo
from miles.errors import RunError
from miles.rollout.engine import FinishReason, GenerateOutput, unstarted
from miles.rollout.native.draft import SlotState, SpeculationSettings
from miles.rollout.native.fused.runner import MOST_STEPS, FusedRunner
from miles.rollout.native.prompt_reading import PromptReading
from miles.rollout.native.runner import PromptEnd, Runner
from miles.rollout.native.sampler import SamplingRows, sample
from miles.rollout.native.scheduler import Admission, Scheduler, Ticket
from miles.rollout.native.slots import Slots
from miles.rollout.native.speculate import Speculation, speculate
from miles.rollout.native.stop_strings import Decode, StopStrings

Finished = tuple[Ticket, GenerateOutput]


@dataclass(frozen=True, slots=True)
class HeldPrompt:
    """A prompt some of whose requests still wait. Its keys and values are in the spare slot of the cache."""

    key: object
    end: PromptEnd
    reader: Ticket | None = None
    """The waiting request that it was read for, when it was read ahead, in chunks."""


@dataclass(slots=True)
class Counters:
    """Totals since the engine was made, in tokens unless named otherwise."""

    generated: int = 0
    prefilled: int = 0
    cached: int = 0
    steps: int = 0


class ContinuousBatch:
    """Requests on their way through `runner`; the cache of the runner has one slot more than requests run."""

    def __init__(
        self,
        runner: Runner | FusedRunner,
        max_running: int,
        context_length: int,
        max_prefill_tokens: int,
        max_total_tokens: int,
        seed: int,
        speculation: SpeculationSettings | None = None,
        decode: Decode | None = None,
    ) -> None:
        spec = runner.spec
        routes_shape = (len(spec.moe_layers), spec.top_k) if spec.is_moe else None
        self.runner = runner
        self.scheduler = Scheduler(max_running, max_prefill_tokens, max_total_tokens)
        self._returns_memory = max_total_tokens < max_running * context_length
        num_depths = 0 if speculation is None else speculation.num_steps
        self.slots = Slots(max_running, context_length, routes_shape, runner.device, num_depths)
        self.stop_strings = StopStrings(self.scheduler, self.slots, decode)
        self.speculation: Speculation | None = None
        if speculation is not None:
            assert isinstance(runner, Runner), "the decode kernel guesses nothing"
            self.speculation = speculate(runner, self.slots, self.stop_strings, speculation)
        self.counters = Counters()
        self.version = 0
        self._seed = seed
        self._spare_slot = max_running
        self._held: HeldPrompt | None = None
        self._reading: PromptReading | None = None
        self._rows: SamplingRows | None = None

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[Finished]:
        """One round; returns the requests that are complete."""
        self.counters.steps += 1
        finished: list[Finished] = []
        budget = self.scheduler.max_prefill_tokens - self._read_long_prompt()
        admissions = self.scheduler.admit(self._held_key, budget)
        if admissions:
            finished += self._prefill(admissions)
        if self.scheduler.running:
            finished += self._decode()
        return finished

    @torch.inference_mode()
    def abort(self, chosen: Callable[[Ticket], bool]) -> list[Finished]:
        """End the chosen requests with what they have."""
        waiting = [(ticket, unstarted()) for ticket in self.scheduler.withdraw(chosen)]
        return waiting + self._finish(self.scheduler.slots_of(chosen), aborted=True)

    def set_version(self, version: int) -> None:
        """From now on tokens are of this weight version. Running requests keep their keys and values."""
        self.version = version
        self.flush()
        lengths = self.slots.lengths[: len(self.scheduler.running)].tolist()
        for ticket, length in zip(self.scheduler.running, lengths, strict=True):
            ticket.weight_versions.append((version, length - ticket.prompt_length))

    def flush(self) -> None:
        """Forget the held prompt, and one half read; its waiting requests will prefill it again."""
        self._held = self._reading = None

    def clear(self) -> None:
        """Forget every request, after a failure that left them half way."""
        self.scheduler.waiting.clear()
        self.scheduler.running.clear()
        self.stop_strings.forget()
        self.flush()

    def cached_positions(self) -> int:
        """Positions of the cache that running requests fill."""
        running = len(self.scheduler.running)
        return int(self.slots.lengths[:running].sum()) - running

    @property
    def _held_key(self) -> object:
        return None if self._held is None else self._held.key

    def _read_long_prompt(self) -> int:
        """Read on in the prompt at the head of the queue, if it is too long for one step; tokens read."""
        head = self.scheduler.next_to_read(self._held_key)
        if head is None:
            self._reading = None
            return 0
        if self._reading is None or self._reading.reader.key != head.key:
            self._held = None
            self._reading = PromptReading(self.runner, self._spare_slot, head)
        num_read = self._reading.read_on(self.scheduler.max_prefill_tokens)
        self.counters.prefilled += num_read
        end = self._reading.end()
        if end is not None:
            if self.speculation is not None:
                self.speculation.draft.read_prompts(
                    [head.request.input_ids], [self._spare_slot], [end.hidden]
                )
            self._held, self._reading = HeldPrompt(head.key, end, self._reading.reader), None
        return num_read

    def _prefill(self, admissions: list[Admission]) -> list[Finished]:
        first = admissions[0].first_slot
        tickets = [ticket for admission in admissions for ticket in admission.tickets]
        self.slots.enter(first, tickets, self._seed)
        self._rows = None
        self.stop_strings.forget()
        ends = self._read_prompts(admissions)
        self._copy_prompts(admissions)
        for admission, end in zip(admissions, ends, strict=True):
            self._share(admission, end)
        self._hold_split_prompt(admissions, ends[-1])
        for ticket in tickets:
            ticket.weight_versions.append((self.version, 0))
        members = torch.tensor([len(a.tickets) for a in admissions], device=self.runner.device)
        logits_PV = torch.cat([end.logits_1V for end in ends])
        hidden_P1D = torch.stack([end.hidden[-1:] for end in ends])
        return self._sample(
            logits_PV.repeat_interleave(members, dim=0), first, hidden_P1D.repeat_interleave(members, dim=0)
        )

    def _read_prompts(self, admissions: list[Admission]) -> list[PromptEnd]:
        """What follows each admitted prompt; a held one is not read again."""
        fresh = [admission for admission in admissions if not admission.held]
        prompts, slots = [a.prompt for a in fresh], [a.first_slot for a in fresh]
        self.counters.prefilled += sum(map(len, prompts))
        ends = self.runner.prefill(prompts, slots) if fresh else []
        if self.speculation is not None and fresh:
            self.speculation.draft.read_prompts(prompts, slots, [end.hidden for end in ends])
        read = iter(ends)
        return [self._held.end if a.held and self._held else next(read) for a in admissions]

    def _copy_prompts(self, admissions: list[Admission]) -> None:
        """Give the keys and values of each prompt to every member of its admission."""
        by_length: dict[int, tuple[list[int], list[int]]] = {}
        for admission in admissions:
            source, destinations = self._spare_slot, list(admission.slots)
            if not admission.held:
                source = destinations.pop(0)
            if destinations and isinstance(self.runner, FusedRunner):
                sources, targets = by_length.setdefault(len(admission.prompt), ([], []))
                sources += [source] * len(destinations)
                targets += destinations
            elif destinations:
                self._copy_slot(source, destinations, len(admission.prompt))
        for length, (sources, targets) in by_length.items():
            # The kernel's cache copies pairs of slots without a buffer between them: one call for all.
            self.runner.cache.move_slots(sources, targets, length)

    def _share(self, admission: Admission, end: PromptEnd) -> None:
        """Give the prompt's routes to every member of the admission, and count what was not computed."""
        first, stop = admission.first_slot, admission.first_slot + len(admission.tickets)
        length = len(admission.prompt)
        sharing = admission.tickets if admission.held else admission.tickets[1:]
        reader = self._held.reader if self._held and admission.held else None
        for ticket in sharing:
            ticket.cached_tokens = 0 if ticket is reader else length
            self.counters.cached += ticket.cached_tokens
        if end.routes is not None:
            self.slots.record_prompt_routes(first, stop, end.routes)
        if self.speculation is not None:
            self.slots.store_prompt(first, stop, admission.prompt)

    def _hold_split_prompt(self, admissions: list[Admission], last_end: PromptEnd) -> None:
        """Keep the last prompt when the head of the queue needs it too."""
        key, last = self.scheduler.split_prefix(admissions), admissions[-1]
        if key is not None and not last.held:
            self._copy_slot(last.first_slot, [self._spare_slot], len(last.prompt))
            self._held = HeldPrompt(key, last_end)

    def _copy_slot(self, source: int, destinations: list[int], length: int) -> None:
        """Give each destination the prompt that `source` has read, the draft's share included."""
        for state in (self.runner.cache, *self._draft_state()):
            state.copy_slot(source, destinations, length)

    def _draft_state(self) -> Sequence[SlotState]:
        return () if self.speculation is None else self.speculation.draft.state

    def _decode(self) -> list[Finished]:
        running = len(self.scheduler.running)
        if self.speculation is not None:
            return self._speculate(self.speculation, running)
        if isinstance(self.runner, FusedRunner) and not self._sampling_rows(0, running).any_truncated:
            return self._advance(self.runner, running)
        tokens_N, positions_N = self.slots.last_tokens[:running], self.slots.lengths[:running] - 1
        logits_NV, routes_NLk = self.runner.decode(tokens_N, positions_N)
        if routes_NLk is not None:
            self.slots.record_decode_routes(routes_NLk)
        return self._sample(logits_NV, first=0)

    def _advance(self, runner: FusedRunner, running: int) -> list[Finished]:
        """Let the decode kernel draw: to the end where nobody waits for a slot, until a request is done where
        somebody does, and a single step when another may come in.
        """
        most_steps = 1 if self.scheduler.may_admit() else MOST_STEPS
        before_N = self.slots.lengths[:running].clone()
        steps, done_N = runner.advance(self.slots, running, most_steps, not self.scheduler.waiting)
        if steps < 0:
            self._refuse_non_finite(-1 - steps)
        self.counters.steps += steps - 1
        counts_N, done_N = self.stop_strings.cut(0, self.slots.lengths[:running] - before_N, done_N)
        self.counters.generated += int(counts_N.sum())
        return self._finish(done_N.nonzero().squeeze(1).tolist())

    def _speculate(self, speculation: Speculation, running: int) -> list[Finished]:
        grown = speculation.step(running, self._sampling_rows(0, running))
        self._check_finite(0, grown.log_probs)
        self.counters.generated += int(grown.counts.sum())
        return self._finish(grown.done.nonzero().squeeze(1).tolist())

    def _sample(
        self, logits_NV: torch.Tensor, first: int, hidden_N1D: torch.Tensor | None = None
    ) -> list[Finished]:
        """Draw the next token of slots first, first + 1, …; those now complete leave."""
        rows = self._sampling_rows(first, first + len(logits_NV))
        positions_N = self.slots.lengths[first : first + len(logits_NV)]
        ids_N, log_probs_N = sample(logits_NV, rows, positions_N, self.runner.numerics.log_softmax)
        self._check_finite(first, log_probs_N)
        done_N = self.slots.append(first, ids_N, log_probs_N)
        _, done_N = self.stop_strings.cut(first, torch.ones_like(ids_N), done_N)
        self.counters.generated += len(ids_N)
        if self.speculation is not None:
            self.speculation.draft.grew(first, torch.ones_like(ids_N), hidden_N1D)
        return self._finish([first + slot for slot in done_N.nonzero().squeeze(1).tolist()])

    def _sampling_rows(self, first: int, stop: int) -> SamplingRows:
        """The parameters of slots first..stop-1; those of all running slots are kept from step to step."""
        if first or self._rows is None:
            rows = self.slots.sampling_rows(first, stop)
            self._rows = None if first else rows
            return rows
        return self._rows

    def _finish(self, slots: Sequence[int], aborted: bool = False) -> list[Finished]:
        """Read the answers of these slots (ascending) and close the holes they leave."""
        if not slots:
            return []
        tickets = [self.scheduler.running[slot] for slot in slots]
        contents, spec_infos = self.slots.read(slots), self.slots.read_speculation(slots)
        finished = [
            (ticket, _output(ticket, *content, spec_info, aborted))
            for ticket, content, spec_info in zip(tickets, contents, spec_infos, strict=True)
        ]
        occupied = len(self.scheduler.running)
        moves = self.scheduler.release(slots)
        if self._returns_memory:
            for _, hole in moves:
                self.runner.cache.give_back(range(hole, hole + 1))
            # One by one: a short request is not moved into the room of a long one.
            for move in moves:
                self._move([move])
            self.runner.cache.give_back(range(len(self.scheduler.running), occupied))
        elif moves:
            self._move(moves)
        self._rows = None
        self.stop_strings.forget()
        return finished

    def _move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Bring requests from slot to slot, each (source, destination)."""
        sources, destinations = [source for source, _ in moves], [target for _, target in moves]
        longest = int(self.slots.lengths[sources].max())
        self.slots.move(sources, destinations, longest)
        for state in (self.runner.cache, *self._draft_state()):
            state.move_slots(sources, destinations, longest)

    def _check_finite(self, first: int, log_probs: torch.Tensor) -> None:
        """log_probs [n] or [n, P] of slots first, first + 1, …"""
        finite = log_probs.isfinite()
        if bool(finite.all()):
            return
        self._refuse_non_finite(first + int(finite.logical_not().nonzero()[0, 0]))

    def _refuse_non_finite(self, slot: int) -> None:
        ticket = self.scheduler.running[slot]
        raise RunError(
            "the policy's logits are not finite",
            where=f"weight version {self.version}, sample key {ticket.request.sample_key}, "
            f"position {int(self.slots.lengths[slot])}",
            why="a weight is NaN or infinite, or an activation overflowed",
            fix="resume from the last good checkpoint; miles diagnose names the step that broke it",
        )


def _output(
    ticket: Ticket,
    tokens: list[int],
    log_probs: np.ndarray,
    routes: np.ndarray | None,
    spec_info: SpecInfo | None,
    aborted: bool,
) -> GenerateOutput:
    """The answer of a request from what its slot held."""
    start = ticket.prompt_length
    output_ids = tokens[start:]
    by_id = output_ids[-1] in ticket.request.sampling.stop_token_ids
    stopped = by_id or ticket.stop_string is not None
    reason: FinishReason = "abort" if aborted else "stop" if stopped else "length"
    wanted = ticket.request.return_routed_experts and routes is not None
    return GenerateOutput(
        output_ids=output_ids,
        log_probs=log_probs[start:],
        routed_experts=routes[:-1] if wanted and routes is not None else None,
        finish_reason=reason,
        weight_versions=_spans(ticket, len(output_ids)),
        cached_tokens=ticket.cached_tokens,
        spec_info=spec_info,
        stop_string=None if by_id else ticket.stop_string,
    )


def _spans(ticket: Ticket, num_output: int) -> list[tuple[int, int]]:
    """Weight spans that hold at least one token: of several that start at one token the last one made it."""
    if len(ticket.weight_versions) == 1 and num_output:
        return ticket.weight_versions
    by_start = {start: version for version, start in ticket.weight_versions if start < num_output}
    return [(version, start) for start, version in by_start.items()]
