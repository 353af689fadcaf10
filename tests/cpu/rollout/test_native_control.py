"""Steering a running engine: weight swaps, pause, abort, cancelled callers, failed transfers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
import torch

from miles.errors import CheckpointError, RunError
from miles.rollout.engine import GenerateOutput, GenerateRequest
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.weights.native_map import to_published
from tests.cpu.rollout.conftest import Policy, make_decoder, now, prompt_groups, request, run

Act = Callable[[NativeEngine], Awaitable[None]]


async def act_after(
    engine: NativeEngine, call: list[GenerateRequest], steps: int, act: Act
) -> list[GenerateOutput]:
    """Generate, and do something once the engine has made so many steps."""
    generating = asyncio.create_task(engine.generate(call))
    while engine.metrics()["steps"] < steps:
        await asyncio.sleep(0)
    await act(engine)
    return await generating


def test_weights_received_by_published_name_are_the_policy(policy: Policy) -> None:
    engine = NativeEngine(policy.spec, EngineSettings(max_context_len=64, seed=11))
    call = [request([1, 2, 3], key=k) for k in range(4)]

    async def receive_and_generate() -> list[GenerateOutput]:
        await engine.receive_weights(to_published(policy.decoder), version=3)
        return await engine.generate(call)

    outputs = run(receive_and_generate())
    expected = run(policy.engine().generate(call))
    assert [out.output_ids for out in outputs] == [out.output_ids for out in expected]
    assert outputs[0].weight_versions == [(3, 0)]
    assert engine.health().weight_version == 3


def test_a_swap_between_steps_starts_a_span_and_the_new_weights_are_used(policy: Policy) -> None:
    """After the swap tokens come from the new weights over the old keys and values, which stay."""
    other = make_decoder(policy.spec, seed=9)

    async def swap(engine: NativeEngine) -> None:
        await engine.receive_weights(to_published(other), version=1)

    call = [request([6, 7, 8], key=k, group=0, max_new_tokens=12) for k in range(3)]
    # The first step yields two tokens (prefill and decode), each later one yields one.
    swapped = run(act_after(policy.engine(), call, steps=4, act=swap))
    unchanged = run(policy.engine().generate(call))
    for out, old in zip(swapped, unchanged, strict=True):
        assert out.weight_versions == [(0, 0), (1, 5)]
        assert out.output_ids[:5] == old.output_ids[:5]
        np.testing.assert_array_equal(out.log_probs[:5], old.log_probs[:5])
        assert not np.allclose(out.log_probs[5:], old.log_probs[5:], atol=1e-3)
        assert_mixed_log_probs(policy, other, out, prompt=[6, 7, 8], old_tokens=5)


def assert_mixed_log_probs(
    policy: Policy, new: torch.nn.Module, out: GenerateOutput, prompt: list[int], old_tokens: int
) -> None:
    """Recompute by hand: old weights read all but the last old token, new weights the rest, one cache."""
    from miles.models.attention import CachedAttention, PackedAttention
    from miles.models.kv_cache import KVCache
    from miles.models.routing import Router

    tokens = [*prompt, *out.output_ids]
    read_by_old = len(prompt) + old_tokens - 1
    cache = KVCache(policy.spec, 1, 64)
    attention = PackedAttention(torch.tensor([0, read_by_old]), cache, torch.tensor([0]))
    with torch.inference_mode():
        policy.decoder(
            torch.tensor(tokens[:read_by_old]), torch.arange(read_by_old), attention, Router.decide()
        )
        for position in range(read_by_old, len(tokens) - 1):
            at = torch.tensor([position])
            hidden = new(
                torch.tensor(tokens[position : position + 1]), at, CachedAttention(cache, at), Router.decide()
            )
            log_probs = torch.log_softmax(new.logits(hidden)[0], dim=-1)  # type: ignore[operator]
            index = position + 1 - len(prompt)
            assert abs(float(log_probs[tokens[position + 1]]) - out.log_probs[index]) < 1e-5


def test_a_prompt_that_waits_is_read_by_the_new_weights(policy: Policy) -> None:
    """The prompt kept for the rest of a split group is of the old weights: a swap forgets it."""
    other = make_decoder(policy.spec, seed=9)

    async def swap(engine: NativeEngine) -> None:
        await engine.receive_weights(to_published(other), version=1)

    call = [request([6, 7, 8], key=k, group=0, max_new_tokens=4) for k in range(3)]
    engine = policy.engine(max_running_requests=2)
    outputs = run(act_after(engine, call, steps=1, act=swap))
    assert outputs[2].weight_versions == [(1, 0)]
    assert outputs[2].cached_tokens == 0 and engine.metrics()["prefilled_tokens"] == 6
    fresh = policy.engine()
    now(fresh.share_weights(other, version=1))
    assert outputs[2].output_ids == run(fresh.generate([call[2]]))[0].output_ids


def test_two_swaps_without_a_token_between_them_leave_one_span(policy: Policy) -> None:
    async def swap_twice(engine: NativeEngine) -> None:
        now(engine.share_weights(policy.decoder, version=1))
        now(engine.share_weights(policy.decoder, version=2))

    (out,) = run(act_after(policy.engine(), [request([1, 2])], steps=2, act=swap_twice))
    assert out.weight_versions == [(0, 0), (2, 3)]


def test_a_version_that_made_no_token_leaves_no_span(policy: Policy) -> None:
    async def swap_and_abort(engine: NativeEngine) -> None:
        await engine.share_weights(policy.decoder, version=1)
        await engine.abort()

    (out,) = run(act_after(policy.engine(), [request([1, 2])], steps=2, act=swap_and_abort))
    assert len(out.output_ids) == 3 and out.weight_versions == [(0, 0)]


def test_shared_weights_are_the_owners_tensors(policy: Policy) -> None:
    """In-place updates of the owner are served without any transfer."""
    mine = make_decoder(policy.spec, seed=4)
    engine = policy.engine()
    now(engine.share_weights(mine, version=1))
    before = run(engine.generate([request([1, 2], temperature=0.0)]))
    mine.load_state_dict(policy.decoder.state_dict())
    now(engine.share_weights(mine, version=2))
    after = run(engine.generate([request([1, 2], temperature=0.0)]))
    assert before[0].output_ids != after[0].output_ids
    assert (
        after[0].output_ids == run(policy.engine().generate([request([1, 2], temperature=0.0)]))[0].output_ids
    )


def test_received_weights_never_touch_a_shared_decoder(policy: Policy) -> None:
    mine = make_decoder(policy.spec, seed=4)
    kept = mine.embed.clone()
    engine = policy.engine()
    now(engine.share_weights(mine, version=1))
    run(engine.receive_weights(to_published(policy.decoder), version=2))
    assert torch.equal(mine.embed, kept)


def test_weights_that_arrive_in_part_are_never_served(policy: Policy) -> None:
    engine = NativeEngine(policy.spec, EngineSettings(max_context_len=64, seed=11))
    whole = list(to_published(policy.decoder))
    run(engine.receive_weights(whole, version=1))
    with pytest.raises(CheckpointError):
        run(engine.receive_weights(whole[:-1], version=2))
    assert not engine.health().ok
    with pytest.raises(RunError, match="version 2"):
        run(engine.generate([request([1])]))
    run(engine.receive_weights(whole, version=3))
    assert run(engine.generate([request([1])]))[0].weight_versions == [(3, 0)]


def test_pause_stops_between_steps_and_resume_changes_nothing(policy: Policy) -> None:
    async def pause_a_while(engine: NativeEngine) -> None:
        await engine.pause()
        await asyncio.sleep(0)
        steps = engine.metrics()["steps"]
        for _ in range(20):
            await asyncio.sleep(0)
        assert engine.health().paused and engine.metrics()["steps"] == steps
        assert engine.health().running == 4
        await engine.resume()

    (call,) = prompt_groups(1, 4)
    paused = run(act_after(policy.engine(), call, steps=2, act=pause_a_while))
    for a, b in zip(paused, run(policy.engine().generate(call)), strict=True):
        assert a.output_ids == b.output_ids
        np.testing.assert_array_equal(a.log_probs, b.log_probs)


def test_abort_returns_what_running_requests_have_and_nothing_for_waiting_ones(policy: Policy) -> None:
    (call,) = prompt_groups(1, 5, max_new_tokens=30)

    async def abort(engine: NativeEngine) -> None:
        assert await engine.abort() == 5

    engine = policy.engine(max_running_requests=3)
    outputs = run(act_after(engine, call, steps=4, act=abort))
    assert [out.finish_reason for out in outputs] == ["abort"] * 5
    assert [len(out.output_ids) for out in outputs] == [5, 5, 5, 0, 0]
    length = len(call[0].input_ids)
    for out in outputs[:3]:
        assert len(out.log_probs) == 5
        assert out.routed_experts is not None and len(out.routed_experts) == length + 4
    assert outputs[4].routed_experts is None and outputs[4].weight_versions == []
    assert engine.health().running == engine.health().waiting == 0
    full = run(policy.engine().generate(call))
    assert outputs[0].output_ids == full[0].output_ids[:5]


def test_abort_of_one_group_leaves_the_others_alone(policy: Policy) -> None:
    calls = prompt_groups(3, 3, max_new_tokens=20)

    async def scenario() -> list[list[GenerateOutput]]:
        engine = policy.engine()
        tasks = [asyncio.create_task(engine.generate(call)) for call in calls]
        while engine.metrics()["steps"] < 5:
            await asyncio.sleep(0)
        assert await engine.abort({1}) == 3
        return [await task for task in tasks]

    outputs = run(scenario())
    assert {out.finish_reason for out in outputs[1]} == {"abort"}
    for i in (0, 2):
        expected = run(policy.engine().generate(calls[i]))
        assert [out.output_ids for out in outputs[i]] == [out.output_ids for out in expected]


def test_a_cancelled_caller_takes_its_requests_along(policy: Policy) -> None:
    gone, stays = prompt_groups(2, 3, max_new_tokens=20)

    async def scenario() -> list[GenerateOutput]:
        engine = policy.engine()
        cancelled = asyncio.create_task(engine.generate(gone))
        kept = asyncio.create_task(engine.generate(stays))
        while engine.metrics()["steps"] < 3:
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        assert engine.health().running == 3
        return await kept

    expected = run(policy.engine().generate(stays))
    assert [out.output_ids for out in run(scenario())] == [out.output_ids for out in expected]


def test_an_engine_outlives_the_event_loop_it_was_used_in(policy: Policy) -> None:
    engine = policy.engine()
    first = run(engine.generate([request([1, 2])]))
    second = run(engine.generate([request([1, 2])]))
    assert first[0].output_ids == second[0].output_ids


def test_metrics_count_tokens_and_never_report_a_rate_before_there_is_one(policy: Policy) -> None:
    engine = policy.engine()
    assert "generated_tokens_per_second" not in engine.metrics()
    run(engine.generate([request([1, 2, 3], key=k, group=0, max_new_tokens=4) for k in range(2)]))
    metrics = engine.metrics()
    assert metrics["generated_tokens"] == 8
    assert (metrics["prefilled_tokens"], metrics["cached_tokens"]) == (3, 3)
    assert metrics["generated_tokens_per_second"] == pytest.approx(8 / metrics["busy_seconds"])
    assert metrics["num_running_requests"] == metrics["token_usage"] == 0
