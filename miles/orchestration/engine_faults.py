"""Faults on the engine's side, put in on purpose: from a step on, its weights or its routes are wrong.

`stale_engine@k`: from step k on the engine keeps its old weights, and says that it has the new ones.
`skip_sync@k`: from step k on no weights are sent, and the engine's version stands still.
`corrupt_routes@k`: the routes of step k and later belong to the neighbouring token.
`drop_routes@k`: samples of step k and later come without routes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from miles.data.source import PromptSource
from miles.orchestration.driver import RolloutSide
from miles.orchestration.rollout_worker import StepRollout
from miles.orchestration.weight_sync import WeightSync

SYNC_FAULTS = ("stale_engine", "skip_sync")
ROUTE_FAULTS = ("corrupt_routes", "drop_routes")


class Receiver(Protocol):
    """One engine, or a pool of them."""

    async def receive_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...


def inject(
    fault: str | None,
    rollout: RolloutSide,
    sync: WeightSync,
    engine: Receiver,
    weights: Callable[[], Iterable[tuple[str, Tensor]]],
) -> tuple[RolloutSide, WeightSync]:
    """The two parts with the fault `kind@step` between them; as they are when it lies elsewhere.

    `weights`: reads what the engine would be sent now.
    """
    match = re.fullmatch(r"(\w+)@(\d+)", fault or "")
    kind, step = (match[1], int(match[2])) if match else ("", 0)
    if kind in SYNC_FAULTS:
        return rollout, OldWeights(sync, engine, weights, step, honest=kind == "skip_sync")
    if kind in ROUTE_FAULTS:
        return WrongRoutes(rollout, step, drop=kind == "drop_routes"), sync
    return rollout, sync


class OldWeights:
    """A weight sync that stops working: version `step` and later do not arrive."""

    def __init__(
        self,
        sync: WeightSync,
        engine: Receiver,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        step: int,
        honest: bool,
    ) -> None:
        self._sync, self._engine, self._weights = sync, engine, weights
        self._step, self._honest = step, honest
        self._kept: list[tuple[str, Tensor]] = []

    async def send(self, version: int) -> None:
        if version < self._step - 1:
            await self._sync.send(version)
        elif not self._kept:
            # Trainer and engine share their tensors: to fall behind, the engine needs its own.
            self._kept = [(name, tensor.detach().clone()) for name, tensor in self._weights()]
            await self._engine.receive_weights(self._kept, version)
        elif not self._honest:
            await self._engine.receive_weights(self._kept, version)


class WrongRoutes:
    """A rollout side whose samples carry other routes than the engine took."""

    def __init__(self, rollout: RolloutSide, step: int, drop: bool) -> None:
        self._rollout, self._step, self._drop = rollout, step, drop

    @property
    def prompts(self) -> PromptSource:
        return self._rollout.prompts

    async def collect(self, step: int) -> StepRollout:
        rollout = await self._rollout.collect(step)
        for sample in rollout.samples if step >= self._step else ():
            routes = sample.rollout_routed_experts
            if routes is not None:
                sample.rollout_routed_experts = None if self._drop else np.roll(routes, 1, axis=0)
        return rollout

    async def evaluate(self) -> dict[str, float]:
        return await self._rollout.evaluate()

    async def set_knobs(self, patch: Mapping[str, float]) -> None:
        await self._rollout.set_knobs(patch)
