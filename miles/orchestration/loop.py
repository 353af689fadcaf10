"""The ring, turned step by step: sample, learn, hand the weights over, write it down."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from miles.config import RunConfig
from miles.orchestration.driver import Driver

Loop = Callable[[Driver], Awaitable[None]]


def loop_of(config: RunConfig) -> Loop:
    """The schedule that a run asks for."""
    if config.rollout.fully_async:
        return fully_asynchronous
    return one_step_ahead if config.rollout.one_step_ahead else synchronous


async def synchronous(driver: Driver) -> None:
    """Every rollout is sampled by exactly the weights that the previous step produced."""
    await driver.begin()
    while (step := driver.next_step()) is not None:
        rollout = await driver.collect(step)
        update = await driver.train(step, rollout)
        await driver.update_weights(step)
        await driver.finish_step(step, rollout, update)


async def one_step_ahead(driver: Driver) -> None:
    """While the trainer learns from a rollout the engines sample the next one.

    From step 2 on a rollout is sampled by the weights of step n - 2, where the synchronous loop has those of
    n - 1. Weights change only when both sides are done, so no response mixes versions.
    """
    await driver.begin()
    while (step := driver.next_step()) is not None:
        rollout = await driver.collect(step)
        async with driver.sampling_ahead(step + 1):
            update = await driver.train(step, rollout)
        await driver.update_weights(step)
        await driver.finish_step(step, rollout, update)


async def fully_asynchronous(driver: Driver) -> None:
    """The engines sample without pause; a step takes what is finished as soon as it is enough.

    Weights change while requests go on, so a response may hold tokens of several versions, each of which is
    recorded. How old the oldest may be is bounded by what is begun, and by what is given back.
    """
    await driver.begin()
    async with driver.sampling():
        while (step := driver.next_step()) is not None:
            rollout = await driver.collect(step)
            update = await driver.train(step, rollout)
            await driver.update_weights(step)
            await driver.finish_step(step, rollout, update)
