"""A long prompt on its way into the cache, a chunk per step, so that running requests decode in between."""

from __future__ import annotations

import torch

from miles.rollout.native.fused.runner import FusedRunner
from miles.rollout.native.runner import PromptEnd, Runner
from miles.rollout.native.scheduler import Ticket


class PromptReading:
    """Reads the prompt of `reader` into `slot`; requests with the same key may share what it read."""

    def __init__(self, runner: Runner | FusedRunner, slot: int, reader: Ticket) -> None:
        self.reader = reader
        self._runner, self._slot = runner, slot
        self._ends: list[PromptEnd] = []
        self._num_read = 0

    def read_on(self, limit: int) -> int:
        """Read the next chunk of at most `limit` tokens; returns how many it had."""
        chunk = self.reader.request.input_ids[self._num_read : self._num_read + limit]
        self._ends.append(self._runner.prefill_chunk(chunk, self._slot, self._num_read))
        self._num_read += len(chunk)
        return len(chunk)

    def end(self) -> PromptEnd | None:
        """What follows the prompt, once all of it is read."""
        if self._num_read < self.reader.prompt_length:
            return None
        routes = [end.routes for end in self._ends if end.routes is not None]
        hidden = torch.cat([end.hidden for end in self._ends])
        return PromptEnd(self._ends[-1].logits_1V, torch.cat(routes) if routes else None, hidden)
