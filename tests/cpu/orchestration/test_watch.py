"""What watches a run beside its loop: its end is the run's, never a silence."""

from __future__ import annotations

import asyncio

import pytest

from miles.errors import RunError
from miles.orchestration.watch import watched


def test_what_a_watch_raises_ends_the_body_and_is_raised_in_its_place() -> None:
    async def scenario() -> None:
        begun = asyncio.Event()
        ended = False

        async def watch() -> None:
            await begun.wait()
            raise RunError("engine-1 cannot be replaced")

        with pytest.raises(RunError, match="engine-1"):
            async with watched(watch):
                try:
                    begun.set()
                    await asyncio.Event().wait()
                finally:
                    ended = True
        assert ended
        await asyncio.sleep(0)  # nothing of the cancellation is left

    asyncio.run(scenario())


def test_a_watch_ends_with_the_body() -> None:
    async def scenario() -> None:
        over = asyncio.Event()

        async def watch() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                over.set()

        async with watched(watch):
            await asyncio.sleep(0)
        await over.wait()
        with pytest.raises(RunError, match="of the body"):
            async with watched(watch):
                raise RunError("of the body")

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_cancelled_body_is_cancelled() -> None:
    async def scenario() -> None:
        async def watch() -> None:
            await asyncio.Event().wait()

        async def body() -> None:
            async with watched(watch):
                await asyncio.Event().wait()

        task = asyncio.create_task(body())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(scenario(), 30))
