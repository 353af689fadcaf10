"""A long prompt is read over several steps: nobody waits for it, and it does not show in the answers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from miles.rollout.engine import GenerateOutput
from tests.cpu.rollout.conftest import Policy, generate_all, make_decoder, now, prompt_groups, request, run

LONG = [(5 * i + 3) % 37 for i in range(41)]


def assert_same(a: GenerateOutput, b: GenerateOutput) -> None:
    assert a.output_ids == b.output_ids and a.finish_reason == b.finish_reason
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(a.routed_experts, b.routed_experts)


@pytest.mark.parametrize("chunk", [1, 7, 20, 40])
def test_chunks_give_the_answers_of_a_prompt_read_whole(policy: Policy, chunk: int) -> None:
    calls = [*prompt_groups(3, 2, max_new_tokens=9), [request(LONG, key=k, group=9) for k in range(60, 64)]]
    whole = generate_all(policy.engine(), calls)
    in_chunks = generate_all(policy.engine(max_prefill_tokens=chunk), calls)
    for expected, outputs in zip(whole, in_chunks, strict=True):
        for a, b in zip(expected, outputs, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("slots", [16, 3])
def test_a_group_reads_its_long_prompt_once(policy: Policy, slots: int) -> None:
    engine = policy.engine(max_prefill_tokens=8, max_running_requests=slots)
    outputs = run(engine.generate([request(LONG, key=k, group=1) for k in range(5)]))
    assert engine.metrics()["prefilled_tokens"] == len(LONG)
    assert [out.cached_tokens for out in outputs] == [0, *[len(LONG)] * 4]
    assert engine.metrics()["cached_tokens"] == 4 * len(LONG)


def test_running_requests_decode_between_chunks(policy: Policy) -> None:
    async def overlap() -> tuple[int, float]:
        engine = policy.engine(max_prefill_tokens=4)
        short = asyncio.create_task(engine.generate([request([1, 2], max_new_tokens=30)]))
        while engine.metrics()["steps"] < 2:
            await asyncio.sleep(0)
        long = asyncio.create_task(engine.generate([request(LONG, key=1)]))
        read_before = engine.metrics()["generated_tokens"]
        while engine.health().running < 2:
            await asyncio.sleep(0)
        decoded = engine.metrics()["generated_tokens"] - read_before
        await asyncio.gather(short, long)
        return -(-len(LONG) // 4), decoded

    chunks, decoded = run(overlap())
    assert decoded >= chunks, "one token for the running request beside each chunk"


def test_new_weights_in_the_middle_of_a_prompt_read_it_again(policy: Policy) -> None:
    newer = make_decoder(policy.spec, seed=8)

    async def swap() -> tuple[GenerateOutput, float]:
        engine = policy.engine(max_prefill_tokens=8)
        answer = asyncio.create_task(engine.generate([request(LONG)]))
        while engine.metrics()["prefilled_tokens"] < 16:
            await asyncio.sleep(0)
        now(engine.share_weights(newer, version=1))
        return (await answer)[0], engine.metrics()["prefilled_tokens"]

    output, prefilled = run(swap())
    assert prefilled == 16 + len(LONG)
    assert output.weight_versions == [(1, 0)]
    expected = run(Policy(policy.spec, newer).engine().generate([request(LONG)]))[0]
    assert_same(output, expected)


def test_a_prompt_aborted_while_it_is_read_leaves_no_trace(policy: Policy) -> None:
    async def abort() -> tuple[GenerateOutput, list[GenerateOutput]]:
        engine = policy.engine(max_prefill_tokens=8)
        first = asyncio.create_task(engine.generate([request(LONG, key=1, group=1)]))
        second = asyncio.create_task(engine.generate([request(LONG[::-1], key=2, group=2)]))
        while engine.metrics()["prefilled_tokens"] < 16:
            await asyncio.sleep(0)
        await engine.abort({1})
        return (await first)[0], await second

    aborted, others = run(abort())
    assert aborted.output_ids == [] and aborted.finish_reason == "abort"
    assert_same(others[0], run(policy.engine().generate([request(LONG[::-1], key=2)]))[0])
