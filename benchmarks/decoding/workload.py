"""What is decoded: groups of samples that share a prompt, all of one length, sampled at temperature 1."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

GROUP = 8


@dataclass(frozen=True)
class Workload:
    """`batch` requests of `prompt` tokens that each answer with exactly `response` tokens."""

    batch: int
    prompt: int
    response: int

    @property
    def new_tokens(self) -> int:
        return self.batch * self.response

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The prompt of every request, group after group; random ids."""
        rng = np.random.default_rng(0)
        groups = -(-self.batch // GROUP)
        rows = rng.integers(1, vocab_size, size=(groups, self.prompt)).tolist()
        return [rows[request // GROUP] for request in range(self.batch)]


@dataclass(frozen=True)
class Timing:
    """Seconds of one run over a workload, prefill included."""

    wall: float
    cpu: float


class Clock:
    """`with Clock() as clock: …`, then `clock.timing`."""

    timing: Timing

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.timing = Timing(time.perf_counter() - self._wall, time.process_time() - self._cpu)
