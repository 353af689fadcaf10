"""Faults on the engine's side begin at their step, and are really there."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from miles.data.sample import Sample
from miles.orchestration import engine_faults
from miles.orchestration.rollout_worker import StepRollout


class Rollout:
    prompts: Any = None

    async def collect(self, step: int) -> StepRollout:
        sample = Sample(prompt="x", tokens=[1, 2, 3, 4])
        sample.rollout_routed_experts = np.arange(6, dtype=np.int16).reshape(3, 1, 2)
        return StepRollout([sample])

    async def evaluate(self) -> dict[str, float]:
        return {"eval/x": 1.0}


class Sync:
    def __init__(self) -> None:
        self.sent: list[int] = []

    async def send(self, version: int) -> None:
        self.sent.append(version)


class Engine:
    def __init__(self) -> None:
        self.received: list[int] = []
        self.weights: list[tuple[str, float]] = []

    async def receive_weights(self, weights: Any, version: int) -> None:
        self.weights = [(name, float(tensor)) for name, tensor in weights]
        self.received.append(version)


def routes_of_steps(kind: str) -> list[list[int] | None]:
    rollout, _ = engine_faults.inject(f"{kind}@2", Rollout(), Sync(), Engine(), None)  # type: ignore[arg-type]
    samples = [asyncio.run(rollout.collect(step)).samples[0] for step in (1, 2, 3)]
    found = [sample.rollout_routed_experts for sample in samples]
    return [None if routes is None else routes[:, 0, 0].tolist() for routes in found]


def test_routes_go_to_the_neighbour_or_are_lost_from_the_step_on() -> None:
    assert routes_of_steps("corrupt_routes") == [[0, 2, 4], [4, 0, 2], [4, 0, 2]]
    assert routes_of_steps("drop_routes") == [[0, 2, 4], None, None]


@pytest.mark.parametrize(("kind", "received"), [("stale_engine", [2, 3, 4]), ("skip_sync", [2])])
def test_the_engine_keeps_the_weights_from_before_the_step(kind: str, received: list[int]) -> None:
    sync, engine = Sync(), Engine()
    weight = torch.zeros(1)
    _, faulty = engine_faults.inject(f"{kind}@3", Rollout(), sync, engine, lambda: [("w", weight)])  # type: ignore[arg-type]
    for version in range(5):
        asyncio.run(faulty.send(version))
        weight += 1
    assert sync.sent == [0, 1] and engine.received == received
    assert engine.weights == [("w", 2.0)], "those of version 2, whatever became of them"


def test_a_fault_of_another_part_changes_nothing_here() -> None:
    rollout, sync = Rollout(), Sync()
    for fault in (None, "nan_grad@3"):
        assert engine_faults.inject(fault, rollout, sync, Engine(), None) == (rollout, sync)  # type: ignore[arg-type]
