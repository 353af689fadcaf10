"""The sampling side: what it begins first, and what it keeps for a resumed run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles.config import parse_flags, resolve
from miles.data.hooks import HookError
from miles.data.prompts import PromptFormat, PromptKeys
from miles.data.rows import parse_data_path
from miles.data.sample import Sample
from miles.data.source import PromptSource, SourceSettings
from miles.orchestration.held_choice import use_buffer_filter
from miles.orchestration.rollout_worker import RolloutWorker
from miles.rollout.collect import CollectSettings
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.generate import GenerationSettings

LENGTHS = {1: 3, 2: 9, 3: 1, 4: 6}
"""How long the responses are, by the prompt's only token."""


class Tokens:
    """Prompts are numbers; a number is its own token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(text)]


class ScriptedEngine:
    """Answers by the table above, and notes the order of the prompts."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateOutput]:
        self.asked.append(requests[0].input_ids[0])
        length = LENGTHS[requests[0].input_ids[0]]
        return [
            GenerateOutput(
                output_ids=[5] * length,
                log_probs=np.zeros(length, dtype=np.float32),
                routed_experts=None,
                finish_reason="stop",
                weight_versions=[(0, 0)],
                cached_tokens=0,
            )
            for _ in requests
        ]

    async def abort(self, groups: Collection[int] | None = None) -> int:
        return 0


FILTER = """
def newest(args, rollout_id, buffer, num_samples):
    assert rollout_id == 7
    picked = buffer[-num_samples:]
    del buffer[-num_samples:]
    return picked

def invented(args, rollout_id, buffer, num_samples):
    return [["nobody"]]
"""


async def score(samples: Sequence[Sample]) -> list[float]:
    return [1.0 for _ in samples]


def worker(path: Path, engine: ScriptedEngine, **more: Any) -> RolloutWorker:
    prompts = PromptSource(
        parse_data_path(str(path)),
        PromptFormat(Tokens(), False),  # type: ignore[arg-type]
        SourceSettings(keys=PromptKeys(label=None), n_samples_per_prompt=2),
    )
    return RolloutWorker(
        engine=engine,
        prompts=prompts,
        score=score,
        detokenize=str,
        generation=GenerationSettings(sampling=SamplingParams(max_new_tokens=10), max_context_len=20),
        settings=CollectSettings(rollout_batch_size=4, over_sampling_batch_size=4),
        **more,
    )


def test_the_second_epoch_begins_with_the_longest_also_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input": str(prompt)}) + "\n" for prompt in LENGTHS))
    engine, later = ScriptedEngine(), ScriptedEngine()
    first = worker(path, engine)
    samples = asyncio.run(first.collect(1)).samples
    assert engine.asked == [1, 2, 3, 4]
    assert [sample.tokens[0] for sample in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    resumed = worker(path, later)
    resumed.prompts.load_state(json.loads(json.dumps(first.prompts.state())))
    for each, asked in ((first, engine.asked), (resumed, later.asked)):
        samples = asyncio.run(each.collect(2)).samples
        assert asked[-4:] == [2, 4, 1, 3]
        assert [sample.tokens[0] for sample in samples] == [1, 1, 2, 2, 3, 3, 4, 4], (
            "samples keep their order"
        )


class Praise:
    """A teacher that is sure of everything."""

    async def advise(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            sample.teacher_log_probs = np.zeros(sample.response_length, dtype=np.float32)


def test_a_served_teacher_reads_what_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input": str(prompt)}) + "\n" for prompt in LENGTHS))
    taught = worker(path, ScriptedEngine(), teachers=Praise())
    rollout = asyncio.run(taught.collect(1))
    assert all(sample.teacher_log_probs is not None for sample in rollout.samples)
    assert rollout.metrics["perf/teacher_log_probs_time"] >= 0


def held_worker(tmp_path: Path, name: str) -> RolloutWorker:
    path, hooks = tmp_path / "prompts.jsonl", tmp_path / "my_buffer.py"
    path.write_text("".join(json.dumps({"input": str(prompt)}) + "\n" for prompt in LENGTHS))
    hooks.write_text(FILTER)
    held = worker(path, ScriptedEngine())
    held.prompts.put_back(held.prompts.next_groups(3))
    flags = ["--partial-rollout", "--buffer-filter-path", f"{hooks}:{name}"]
    use_buffer_filter(held.prompts, resolve(flags=parse_flags(flags)).config, lambda: 7)
    return held


def test_a_function_chooses_which_held_groups_go_on(tmp_path: Path) -> None:
    held = held_worker(tmp_path, "newest")
    assert [group[0].group_index for group in held.prompts.next_groups(2)] == [1, 2]
    assert [group[0].group_index for group in held.prompts.held] == [0]
    assert [group[0].group_index for group in held.prompts.next_groups(2)] == [0, 3]


def test_a_choice_from_outside_the_buffer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="did not choose from the buffer"):
        held_worker(tmp_path, "invented").prompts.next_groups(2)
