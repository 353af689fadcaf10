"""Partial rollouts: what a full batch leaves unfinished is kept and continued under the next weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from miles.data.held_groups import read_groups, write_groups
from miles.data.sample import Sample, SampleStatus
from miles.errors import DataError
from miles.rollout.collect import CollectSettings, Group, Rollout, collect
from miles.rollout.engine import SamplingParams
from miles.rollout.generate import GenerationSettings, generate_group, request_for
from miles.rollout.native.engine import NativeEngine
from tests.cpu.rollout.conftest import Policy, make_decoder, now, run

SETTINGS = GenerationSettings(sampling=SamplingParams(max_new_tokens=24), max_context_len=64)
MASKED = GenerationSettings(sampling=SETTINGS.sampling, max_context_len=64, mask_off_policy=True)
SIZE = 2


def detokenize(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def group_of(index: int) -> Group:
    prompt = np.random.default_rng(index).integers(0, 37, size=5).tolist()
    return [Sample(prompt="", tokens=prompt, group_index=index, index=index * SIZE + i) for i in range(SIZE)]


async def judge(group: Sequence[Sample]) -> list[float]:
    return [float(sample.index or 0) for sample in group]


def roll_out(
    engine: NativeEngine, groups: list[Group], wanted: int, settings: GenerationSettings, rollout_id: int
) -> Rollout:
    async def generate(group: Sequence[Sample]) -> Group:
        return await generate_group(engine, group, settings, detokenize, rollout_id)

    limits = CollectSettings(
        rollout_batch_size=wanted, over_sampling_batch_size=len(groups), keep_unused=True
    )
    return run(collect(engine, lambda _: groups, generate, judge, limits))


def first_half(engine: NativeEngine) -> list[Group]:
    """Eight groups in ten slots, two of them wanted: the others are cut off at different places."""
    early = [group_of(index) for index in range(8)]
    for sample in (early[0] + early[1])[:4]:
        sample.tokens = [*sample.tokens, 1, 2]

    async def generate(group: Sequence[Sample]) -> Group:
        short = GenerationSettings(
            sampling=SamplingParams(max_new_tokens=6 if group[0].group_index in (0, 1) else 24),
            max_context_len=64,
        )
        return await generate_group(engine, group, short, detokenize, 0)

    limits = CollectSettings(rollout_batch_size=2, over_sampling_batch_size=8, keep_unused=True)
    rollout = run(collect(engine, lambda _: early, generate, judge, limits))
    assert [group[0].group_index for group in rollout.groups] == [0, 1]
    assert rollout.metrics["rollout/kept_groups"] == 6.0
    return rollout.unused


def test_what_was_cut_off_keeps_tokens_log_probs_routes_and_versions(policy: Policy) -> None:
    kept = first_half(policy.engine(max_running_requests=10))
    assert [group[0].group_index for group in kept] == [2, 3, 4, 5, 6, 7]
    begun = [sample for group in kept for sample in group if sample.response_length]
    unbegun = [sample for group in kept for sample in group if not sample.response_length]
    assert begun and unbegun, "some requests still waited in the queue"
    for sample in begun:
        assert sample.status is SampleStatus.ABORTED and sample.reward is None
        assert (
            sample.rollout_log_probs is not None and len(sample.rollout_log_probs) == sample.response_length
        )
        assert sample.rollout_routed_experts is not None
        assert sample.rollout_routed_experts.shape == (len(sample.tokens) - 1, 2, 2)
        assert sample.weight_versions == [(0, 0)]


def test_they_are_continued_under_the_next_weights_token_by_token(policy: Policy) -> None:
    engine = policy.engine(max_running_requests=10)
    kept = first_half(engine)
    before = {sample.index: sample for group in kept for sample in group}
    newer = make_decoder(policy.spec, seed=5)
    now(engine.share_weights(newer, version=1))
    rollout = roll_out(engine, kept, wanted=6, settings=SETTINGS, rollout_id=1)
    assert not rollout.unused
    for sample in (sample for group in rollout.groups for sample in group):
        old = before[sample.index]
        cut = len(old.tokens)
        assert sample.status is SampleStatus.TRUNCATED and sample.response_length == 24
        assert sample.tokens[:cut] == old.tokens and sample.response == detokenize(sample.tokens[5:])
        spans = [(0, 0), (1, old.response_length)] if old.response_length else [(1, 0)]
        assert sample.weight_versions == spans and sample.loss_mask is None
        (new_log_probs,), (new_routes,) = Policy(policy.spec, newer).packed([sample.tokens])
        (old_log_probs,), (old_routes,) = policy.packed([sample.tokens])
        at = np.arange(4, len(sample.tokens) - 1)
        expected = np.where(
            at < cut - 1, old_log_probs[at, sample.tokens[5:]], new_log_probs[at, sample.tokens[5:]]
        )
        np.testing.assert_allclose(sample.rollout_log_probs, expected, atol=1e-5)
        # Rows that were recorded keep their routes; the last token of the first part was first read now.
        routes = (
            np.concatenate([old_routes[: cut - 1], new_routes[cut - 1 :]])
            if old.response_length
            else new_routes
        )
        np.testing.assert_array_equal(sample.rollout_routed_experts, routes)


def test_tokens_of_older_weights_can_be_left_out_of_the_loss(policy: Policy) -> None:
    engine = policy.engine(max_running_requests=10)
    kept = first_half(engine)
    begun = {sample.index: sample.response_length for group in kept for sample in group}
    rollout = roll_out(engine, kept, wanted=6, settings=MASKED, rollout_id=1)
    for sample in (sample for group in rollout.groups for sample in group):
        old = begun[sample.index]
        assert sample.trained_tokens == 24 - old
        assert (sample.loss_mask or [1] * 24)[:old] == [0] * old


def test_limits_of_the_response_count_what_it_has(policy: Policy) -> None:
    (sample, *_) = (s for group in first_half(policy.engine(max_running_requests=10)) for s in group)
    has = sample.response_length
    limits = SamplingParams(max_new_tokens=24, min_new_tokens=20)
    asked = request_for(sample, 0, replace(SETTINGS, sampling=limits), 1).sampling
    assert has > 0 and (asked.max_new_tokens, asked.min_new_tokens) == (24 - has, 20 - has)
    tight = replace(SETTINGS, sampling=limits, max_context_len=len(sample.tokens) + 3)
    asked = request_for(sample, 0, tight, 1).sampling
    assert (asked.max_new_tokens, asked.min_new_tokens) == (3, 3)


def test_members_that_were_complete_are_not_generated_again(policy: Policy) -> None:
    engine = policy.engine()
    done = run(generate_group(engine, group_of(0), SETTINGS, detokenize, 0))
    again = run(generate_group(engine, done, SETTINGS, detokenize, 1))
    assert all(a is b for a, b in zip(done, again, strict=True))


def test_complete_groups_beyond_the_batch_wait_with_their_rewards(policy: Policy) -> None:
    judged = []

    async def judge_once(group: Sequence[Sample]) -> list[float]:
        judged.append(group[0].group_index)
        return [1.0] * len(group)

    async def generate(group: Sequence[Sample]) -> Group:
        return await generate_group(policy.engine(), group, SETTINGS, detokenize, 0)

    async def instantly(group: Sequence[Sample]) -> Group:
        return list(group)

    limits = CollectSettings(rollout_batch_size=1, over_sampling_batch_size=3, keep_unused=True)
    done = [run(generate(group_of(index))) for index in range(3)]
    first = run(collect(policy.engine(), lambda _: done, instantly, judge_once, limits))
    assert [group[0].group_index for group in first.unused] == [1, 2]
    second = run(collect(policy.engine(), lambda _: first.unused, instantly, judge_once, limits))
    assert [group[0].group_index for group in second.groups] == [1]
    assert sorted(judged) == [0, 1, 2], "a reward is computed once"


def test_without_keeping_nothing_comes_back(policy: Policy) -> None:
    async def instantly(group: Sequence[Sample]) -> Group:
        await asyncio.sleep(0)
        return list(group)

    limits = CollectSettings(rollout_batch_size=1, over_sampling_batch_size=3)
    rollout = run(
        collect(policy.engine(), lambda n: [group_of(i) for i in range(n)], instantly, judge, limits)
    )
    assert not rollout.unused and "rollout/kept_groups" not in rollout.metrics


def test_kept_groups_survive_a_checkpoint(policy: Policy, tmp_path) -> None:
    kept = first_half(policy.engine(max_running_requests=10))
    path = tmp_path / "held.jsonl"
    write_groups(path, kept)
    back = read_groups(path)
    assert [[sample.index for sample in group] for group in back] == [[s.index for s in g] for g in kept]
    for a, b in zip((s for g in kept for s in g), (s for g in back for s in g), strict=True):
        b.validate()
        assert (a.tokens, a.status, a.weight_versions) == (b.tokens, b.status, b.weight_versions)
        np.testing.assert_array_equal(a.rollout_log_probs, b.rollout_log_probs)
        if a.rollout_routed_experts is not None:
            np.testing.assert_array_equal(a.rollout_routed_experts, b.rollout_routed_experts)
    assert read_groups(tmp_path / "none.jsonl") == []
    kept[0][0].metadata["tool"] = object()
    with pytest.raises(DataError, match="cannot be stored"):
        write_groups(path, kept)


@pytest.mark.parametrize("engine_slots", [10, 64])
def test_the_same_numbers_are_drawn_whatever_ran_beside(policy: Policy, engine_slots: int) -> None:
    """A continued response draws from the positions it continues at, so it depends on its own past only."""
    kept = first_half(policy.engine(max_running_requests=10))
    wide = roll_out(policy.engine(max_running_requests=engine_slots), kept, 6, SETTINGS, rollout_id=1)
    alone = [
        run(generate_group(policy.engine(), group, SETTINGS, detokenize, rollout_id=1)) for group in kept
    ]
    assert [s.tokens for g in wide.groups for s in g] == [s.tokens for g in alone for s in g]
