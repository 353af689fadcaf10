"""The sampling side of a run whose engines never pause: its prompts flow from step to step."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from miles.orchestration.rollout_worker import RolloutWorker, StepRollout
from miles.rollout.collect import Group
from miles.rollout.producer import Producer
from miles.rollout.staleness import FlowSettings
from miles.rollout.statistics import rollout_metrics


class AsyncRolloutWorker(RolloutWorker):
    """A rollout worker around a producer (`driver.Stream`). `parts`: those of a `RolloutWorker`."""

    def __init__(self, flow: FlowSettings, **parts: Any) -> None:
        super().__init__(**parts)
        self._producer = Producer(
            self.engine,
            self._draw,
            self.prompts.put_back,
            lambda step: self._generate(self._generation, step),
            self._score,
            flow,
            self._settings.dynamic_filter,
        )

    def serve(self, version: int) -> None:
        """The engines serve `version` from now on."""
        self._producer.serve(version)

    def waiting(self) -> list[Group]:
        """Groups that were drawn and not trained on, as a checkpoint keeps them."""
        return self._producer.waiting()

    @asynccontextmanager
    async def flowing(self, step: int, last_step: int) -> AsyncIterator[None]:
        """Sample while the body runs; `step` takes the first batch. A body that fails ends it at once."""
        self._producer.start(step, last_step)
        done = False
        try:
            yield
            done = True
        finally:
            await self._producer.stop(politely=done)

    async def collect(self, step: int) -> StepRollout:
        """The batch of a step, as soon as it is complete. Sampling time is that since the batch before."""
        taken = await self._producer.take(step)
        self.step = step
        metrics = rollout_metrics(taken.groups, self._settings.reward_key) | taken.metrics
        rollout = await self._complete(taken.groups, metrics, time.perf_counter() - taken.seconds)
        # Batches overlap: none has a time of its own, while tokens per second are those of all of them.
        del rollout.metrics["perf/rollout_time"]
        return rollout
