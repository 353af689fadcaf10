"""The sampling side of a speculative run: how many steps are guessed, and what that is measured to gain."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from miles.data.length_book import LengthBook
from miles.data.sample import Sample, SpecInfo
from miles.errors import RunError
from miles.orchestration.rollout_worker import SPECULATIVE_STEPS, RolloutWorker
from miles.rollout.collect import CollectSettings, Group
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.generate import GenerationSettings


class Engine:
    """Answers with one token, and says what it was asked."""

    def __init__(self, *measured: dict[str, float]) -> None:
        self.asked: list[int | None] = []
        self._measured = measured

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateOutput]:
        self.asked += [request.speculative_num_steps for request in requests]
        return [
            GenerateOutput(
                output_ids=[7],
                log_probs=np.zeros(1, dtype=np.float32),
                routed_experts=None,
                finish_reason="stop",
                weight_versions=[(0, 0)],
                cached_tokens=0,
                spec_info=SpecInfo(1, 2, 1, [1], [1]),
            )
            for _ in requests
        ]

    async def abort(self, groups: Any = None) -> int:
        return 0

    async def measurements(self) -> Sequence[dict[str, float]]:
        return self._measured


class Prompts:
    problems: tuple[()] = ()
    lengths = LengthBook()

    def next_groups(self, count: int) -> list[Group]:
        return [[Sample(prompt="p", tokens=[1, 2], group_index=g, index=g)] for g in range(count)]

    def put_back(self, groups: Sequence[Group]) -> None: ...


def worker(engine: Engine, steps: int | None) -> RolloutWorker:
    async def score(samples: Sequence[Sample]) -> list[float]:
        return [1.0] * len(samples)

    return RolloutWorker(
        engine=engine,
        prompts=Prompts(),  # type: ignore[arg-type]
        score=score,
        detokenize=str,
        generation=GenerationSettings(
            sampling=SamplingParams(max_new_tokens=4), max_context_len=8, speculative_num_steps=steps
        ),
        settings=CollectSettings(rollout_batch_size=2, over_sampling_batch_size=2),
    )


def test_the_number_of_steps_changes_between_rollouts() -> None:
    engine = Engine()
    rollout = worker(engine, steps=3)

    async def two_rollouts() -> None:
        await rollout.collect(1)
        await rollout.set_knobs({SPECULATIVE_STEPS: 1.0})
        await rollout.collect(2)
        await rollout.set_knobs({SPECULATIVE_STEPS: 0})
        await rollout.collect(3)

    asyncio.run(two_rollouts())
    assert engine.asked == [3, 3, 1, 1, 0, 0]


@pytest.mark.parametrize("value", [4, -1, 1.5])
def test_steps_that_the_engine_was_not_made_for_are_refused(value: float) -> None:
    engine = Engine()
    rollout = worker(engine, steps=3)
    with pytest.raises(RunError, match="cannot be"):
        asyncio.run(rollout.set_knobs({SPECULATIVE_STEPS: value}))
    asyncio.run(rollout.collect(1))
    assert engine.asked == [3, 3]


def test_a_run_without_speculation_refuses_the_setting_and_reports_nothing() -> None:
    rollout = worker(Engine({"spec_speedup": 2.0}), steps=None)
    with pytest.raises(RunError, match="cannot be changed"):
        asyncio.run(rollout.set_knobs({SPECULATIVE_STEPS: 1}))
    assert not any("spec_speedup" in name for name in asyncio.run(rollout.collect(1)).metrics)


def test_what_guessing_gains_is_a_mean_over_the_engines_that_measured_it() -> None:
    def measured(speculative: float, plain: float) -> dict[str, float]:
        return {
            "steps": 9.0,
            "spec_tokens_per_second": speculative,
            "plain_tokens_per_second": plain,
            "spec_speedup": speculative / plain,
        }

    rollout = worker(Engine(measured(300, 100), measured(100, 100), {"steps": 1.0}), steps=3)
    metrics = asyncio.run(rollout.collect(1)).metrics
    assert metrics["perf/spec_tokens_per_sec"] == 200
    assert metrics["perf/plain_tokens_per_sec"] == 100
    assert metrics["perf/spec_speedup"] == 2
    assert metrics["rollout/spec_accept_length"] == 2
    unmeasured = asyncio.run(worker(Engine({"steps": 1.0}), steps=3).collect(1)).metrics
    assert "perf/spec_speedup" not in unmeasured
