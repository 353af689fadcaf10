"""What goes on beside a run's loop to find what no request would find; it ends a run that cannot go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from miles.config.sections.fault_tolerance import FaultToleranceSection
from miles.orchestration.engine_pool import EnginePool

Watch = Callable[[], Coroutine[Any, Any, None]]
"""Goes on for as long as its task lives; raises what ends the run."""


def health_watch(pool: EnginePool, tolerance: FaultToleranceSection) -> Watch | None:
    """The health checks of engines, where they are asked for."""
    if not tolerance.use_fault_tolerance:
        return None
    return partial(
        pool.check_health,
        tolerance.rollout_health_check_interval,
        tolerance.rollout_health_check_timeout,
        tolerance.rollout_health_check_first_wait,
    )


@asynccontextmanager
async def watched(watch: Watch | None) -> AsyncIterator[None]:
    """Watch while the body runs. What the watch raises ends the body, and is raised in its place."""
    if watch is None:
        yield
        return
    body = asyncio.current_task()
    assert body is not None, "a body runs in a task"
    watching = asyncio.create_task(watch(), name="watch")

    def end_body(_: asyncio.Task[None]) -> None:
        body.cancel()

    watching.add_done_callback(end_body)
    try:
        yield
    except asyncio.CancelledError:
        if watching.done():
            body.uncancel()
            watching.result()
        raise
    finally:
        watching.remove_done_callback(end_body)
        watching.cancel()
