"""The rollout that is sampled while another one is trained on, and its place in a checkpoint.

At a step boundary it is complete. It was sampled by weights that no checkpoint holds any more, so a
checkpoint holds the samples themselves, and a resumed run goes on as if it had never ended.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from miles.data.sample import Sample
from miles.orchestration.rollout_worker import StepRollout

AHEAD_FILE = "ahead_rollout.json"


class Ahead:
    """Holds at most one rollout. `waited`: seconds that training was done and sampling was not."""

    def __init__(self) -> None:
        self.rollout: StepRollout | None = None
        self.waited: float | None = None

    def take(self) -> StepRollout | None:
        """The rollout, which is then no longer held."""
        rollout, self.rollout = self.rollout, None
        return rollout

    @asynccontextmanager
    async def beside(self, collect: Coroutine[Any, Any, StepRollout]) -> AsyncIterator[None]:
        """Sample while the body runs; both are done at the end. A body that fails ends the sampling."""
        task = asyncio.create_task(collect, name="sampling-ahead")
        try:
            yield
            started = time.perf_counter()
            self.rollout = await task
            self.waited = time.perf_counter() - started
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def write(self, directory: Path) -> None:
        """Put the rollout into a checkpoint, where there is one."""
        if self.rollout is not None:
            samples = [sample.to_dict() for sample in self.rollout.samples]
            content = {"metrics": self.rollout.metrics, "samples": samples}
            (directory / AHEAD_FILE).write_text(json.dumps(content), encoding="utf-8")

    def read(self, directory: Path) -> None:
        """Hold what `write` left in a checkpoint, where it left something."""
        path = directory / AHEAD_FILE
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            samples = [Sample.from_dict(record) for record in content["samples"]]
            self.rollout = StepRollout(samples, content["metrics"])
