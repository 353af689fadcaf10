"""From prompt groups to scored samples: generation, over-sampling, the filter, the order, the metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest

from miles.data.sample import Sample, SampleStatus
from miles.errors import RunError
from miles.rollout.collect import CollectSettings, Group, Rollout, collect
from miles.rollout.engine import RequestRefused, SamplingParams
from miles.rollout.filters import DynamicFilter, check_reward_nonzero_std
from miles.rollout.generate import EVAL_ROLLOUT_ID, GenerationSettings, generate_group, sample_key
from miles.rollout.native.engine import NativeEngine
from tests.cpu.rollout.conftest import Policy, run

STOPS = (3, 8, 21, 30)
SETTINGS = GenerationSettings(
    sampling=SamplingParams(max_new_tokens=10, stop_token_ids=STOPS), max_context_len=64
)


def detokenize(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def group_of(index: int, size: int = 4) -> Group:
    prompt = np.random.default_rng(index).integers(0, 37, size=4 + index % 3).tolist()
    return [
        Sample(prompt=detokenize(prompt), tokens=prompt, group_index=index, index=index * size + i)
        for i in range(size)
    ]


class Stream:
    """Groups 0, 1, 2, … as a prompt source gives them."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, count: int) -> list[Group]:
        first, self.next = self.next, self.next + count
        return [group_of(index) for index in range(first, self.next)]


async def score_length(group: Sequence[Sample]) -> list[float]:
    return [float(sample.response_length) for sample in group]


def collect_with(
    engine: NativeEngine,
    wanted: int,
    drawn: int,
    dynamic_filter: DynamicFilter | None = None,
    rollout_id: int = 0,
    score: object = score_length,
) -> Rollout:
    async def generate(group: Sequence[Sample]) -> Group:
        return await generate_group(engine, group, SETTINGS, detokenize, rollout_id)

    settings = CollectSettings(
        rollout_batch_size=wanted, over_sampling_batch_size=drawn, dynamic_filter=dynamic_filter
    )
    return run(collect(engine, Stream(), generate, score, settings))  # type: ignore[arg-type]


def test_a_generated_sample_holds_all_that_training_needs(policy: Policy) -> None:
    engine = policy.engine()
    pending = group_of(0, size=16)
    filled = run(generate_group(engine, pending, SETTINGS, detokenize, rollout_id=0))
    assert all(sample.status is SampleStatus.PENDING and not sample.response for sample in pending)
    prompt = pending[0].tokens
    for sample in filled:
        response = sample.tokens[len(prompt) :]
        assert sample.tokens[: len(prompt)] == prompt
        assert sample.response_length == len(response)
        ended = response[-1] in STOPS
        assert sample.response == detokenize(response[:-1] if ended else response), (
            "the stop token is no text"
        )
        assert sample.status is (SampleStatus.COMPLETED if ended else SampleStatus.TRUNCATED)
        assert sample.rollout_log_probs is not None and len(sample.rollout_log_probs) == len(response)
        assert sample.rollout_routed_experts is not None
        assert sample.rollout_routed_experts.shape == (len(sample.tokens) - 1, 2, 2)
        assert sample.weight_versions == [(0, 0)]
        assert sample.sampling["temperature"] == 1.0 and sample.sampling["max_new_tokens"] == 10
    assert {sample.status for sample in filled} == {SampleStatus.COMPLETED, SampleStatus.TRUNCATED}
    (log_probs,), (routes,) = policy.packed([filled[1].tokens])
    rows = log_probs[np.arange(len(prompt) - 1, len(filled[1].tokens) - 1), filled[1].tokens[len(prompt) :]]
    np.testing.assert_allclose(filled[1].rollout_log_probs, rows.numpy(), atol=1e-5)
    np.testing.assert_array_equal(filled[1].rollout_routed_experts, routes)


def test_the_context_cap_shortens_responses_and_a_full_prompt_is_refused(policy: Policy) -> None:
    tight = GenerationSettings(sampling=SamplingParams(max_new_tokens=10), max_context_len=7)
    engine = policy.engine(max_context_len=7)
    filled = run(generate_group(engine, group_of(0), tight, detokenize, 0))
    assert {(len(s.tokens), s.status) for s in filled} == {(7, SampleStatus.TRUNCATED)}
    full = [Sample(prompt="", tokens=list(range(7)), group_index=1, index=9)]
    with pytest.raises(RequestRefused, match=r"sample 9 \(group 1\): a prompt of 7 tokens"):
        run(generate_group(engine, full, tight, detokenize, 0))


def test_sample_keys_are_distinct_over_rollouts_groups_and_members() -> None:
    ids = [(r, g, m) for r in (0, 1, 7, EVAL_ROLLOUT_ID) for g in (0, 1, 999) for m in range(16)]
    keys = {sample_key(*each) for each in ids}
    assert len(keys) == len(ids) and min(keys) >= 0 and max(keys) < 1 << 63


def test_groups_come_ordered_and_the_same_from_any_engine_shape(policy: Policy) -> None:
    wide = collect_with(policy.engine(), wanted=6, drawn=6)
    narrow = collect_with(policy.engine(max_running_requests=3), wanted=6, drawn=6)
    assert [group[0].group_index for group in wide.groups] == list(range(6))
    for a, b in zip(chain(*wide.groups), chain(*narrow.groups), strict=True):
        assert (a.tokens, a.reward) == (b.tokens, b.reward)


def test_every_rollout_draws_anew_and_a_repeated_one_draws_the_same(policy: Policy) -> None:
    first, again, second = (
        [s.tokens for g in collect_with(policy.engine(), 3, 3, rollout_id=i).groups for s in g]
        for i in (0, 0, 1)
    )
    assert first == again != second


def test_the_filter_drops_flat_groups_and_more_are_drawn_until_the_batch_is_full(policy: Policy) -> None:
    async def score_only_every_third(group: Sequence[Sample]) -> list[float]:
        varied = group[0].group_index % 3 == 0  # type: ignore[operator]
        return [float(i == 0 and varied) for i, _ in enumerate(group)]

    rollout = collect_with(policy.engine(), 4, 5, check_reward_nonzero_std(), score=score_only_every_third)
    assert [group[0].group_index for group in rollout.groups] == [0, 3, 6, 9]
    assert rollout.groups_drawn in (10, 15)
    assert rollout.metrics["rollout/dynamic_filter/drop_zero_std_0"] >= 6
    assert rollout.metrics["rollout/zero_std/fraction"] == 0


def test_groups_are_ordered_by_index_whatever_finishes_first(policy: Policy) -> None:
    async def score_later_groups_sooner(group: Sequence[Sample]) -> list[float]:
        for _ in range(20 - 3 * (group[0].group_index or 0)):
            await asyncio.sleep(0)
        return [0.0] * len(group)

    rollout = collect_with(policy.engine(), 5, 5, score=score_later_groups_sooner)
    assert [group[0].group_index for group in rollout.groups] == list(range(5))


def test_over_sampled_groups_still_running_are_aborted_and_not_scored(policy: Policy) -> None:
    scored = []

    async def score(group: Sequence[Sample]) -> list[float]:
        scored.append(group[0].group_index)
        return [0.0] * len(group)

    engine = policy.engine(max_running_requests=4)
    rollout = collect_with(engine, wanted=2, drawn=8, score=score)
    assert len(rollout.groups) == 2 and rollout.groups_drawn == 8
    assert engine.health().running == engine.health().waiting == 0
    assert engine.metrics()["generated_tokens"] < 8 * 4 * 10 / 2
    assert len(scored) < 8


def test_groups_that_complete_together_do_not_overfill_the_batch(policy: Policy) -> None:
    async def generate_nothing(group: Sequence[Sample]) -> Group:
        return list(group)

    settings = CollectSettings(rollout_batch_size=2, over_sampling_batch_size=6)
    rollout = run(collect(policy.engine(), Stream(), generate_nothing, score_length, settings))
    assert [group[0].group_index for group in rollout.groups] == [0, 1]


def test_a_filter_that_rejects_everything_ends_with_its_reasons(policy: Policy) -> None:
    async def score_zero(group: Sequence[Sample]) -> list[float]:
        return [0.0] * len(group)

    with pytest.raises(RunError, match="zero_std_0: 100"):
        collect_with(policy.engine(), 1, 1, check_reward_nonzero_std(), score=score_zero)


def test_a_failing_reward_surfaces_and_leaves_nothing_running(policy: Policy) -> None:
    async def fail_on_group_1(group: Sequence[Sample]) -> list[float]:
        if group[0].group_index == 1:
            raise RunError("the verifier is gone")
        await asyncio.sleep(0)
        return [0.0] * len(group)

    engine = policy.engine(max_running_requests=8)
    with pytest.raises(RunError, match="the verifier is gone"):
        collect_with(engine, 6, 6, score=fail_on_group_1)
    assert engine.health().ok and engine.health().running == engine.health().waiting == 0
