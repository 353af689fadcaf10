"""More requests than the KV cache holds: they wait, never crash, and memory stays under the bound."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from miles.arch.spec import ArchSpec, AttentionSpec, LayerSpec
from miles.models.kv_cache import KVCache
from miles.planning.engine_limits import EngineLimits
from miles.planning.memory import estimate_memory
from miles.rollout.engine import GenerateOutput, GenerateRequest, RequestRefused
from miles.rollout.native.engine import NativeEngine
from tests.cpu.rollout.conftest import Policy, generate_all, make_decoder, now, prompt_groups, request, run

PAGE = 4096


def held_tokens(engine: NativeEngine) -> int:
    """Tokens in the slots of running requests."""
    return int(engine._batch.slots.lengths[: engine.health().running].sum())


async def answer_watched(
    engine: NativeEngine, calls: list[list[GenerateRequest]]
) -> tuple[list[list[GenerateOutput]], int, int]:
    """All calls at once; beside the answers the most requests that ran and the most tokens they held."""
    tasks = [asyncio.create_task(engine.generate(call)) for call in calls]
    most_running = most_tokens = 0
    while not all(task.done() for task in tasks):
        most_running = max(most_running, engine.health().running)
        most_tokens = max(most_tokens, held_tokens(engine))
        await asyncio.sleep(0)
    return [task.result() for task in tasks], most_running, most_tokens


@pytest.mark.parametrize("bound", [40, 64, 100])
def test_an_overfull_queue_waits_and_every_answer_is_the_same(policy: Policy, bound: int) -> None:
    calls = [*prompt_groups(9, 3, max_new_tokens=12), [request([5] * 20, key=99, max_new_tokens=19)]]
    answers, running, tokens = run(answer_watched(policy.engine(max_total_tokens=bound), calls))
    assert tokens <= bound
    assert 1 < running < 28
    for one, other in zip(answers, generate_all(policy.engine(), calls), strict=True):
        assert [out.output_ids for out in one] == [out.output_ids for out in other]


def test_a_request_that_needs_nearly_everything_gets_it_when_the_others_are_done(policy: Policy) -> None:
    large = [request([5] * 40, key=99, max_new_tokens=20)]
    small = prompt_groups(6, 2, max_new_tokens=10)
    calls = [*small[:3], large, *small[3:]]
    for limits in ({}, {"max_prefill_tokens": 8}):
        engine = policy.engine(max_total_tokens=62, **limits)
        answers, _, tokens = run(answer_watched(engine, calls))
        assert tokens <= 62
        assert len(answers[3][0].output_ids) == 20


def test_a_request_that_can_never_fit_is_refused_by_name(policy: Policy) -> None:
    engine = policy.engine(max_total_tokens=30)
    with pytest.raises(RequestRefused, match="23 prompt tokens and 8 new ones make 31") as refused:
        run(engine.generate([request([1] * 23)]))
    assert "--sglang-max-total-tokens 31" in str(refused.value)
    assert len(run(engine.generate([request([1] * 22)]))) == 1


def test_aborts_and_weight_swaps_leave_no_room_taken(policy: Policy) -> None:
    newer = make_decoder(policy.spec, seed=4)

    async def disturb() -> list[list[GenerateOutput]]:
        engine = policy.engine(max_total_tokens=60, max_prefill_tokens=8)
        calls = prompt_groups(12, 3, max_new_tokens=14)
        tasks = [asyncio.create_task(engine.generate(call)) for call in calls]
        for version, doomed in enumerate(({0, 5}, {1}, {9}), start=1):
            for _ in range(4):
                await asyncio.sleep(0)
                assert held_tokens(engine) <= 60
            await engine.abort(doomed)
            now(engine.share_weights(newer if version % 2 else policy.decoder, version))
        tasks[11].cancel()
        answers = await asyncio.gather(*tasks[:11])
        # Nothing is left of anybody: the largest request there can be still enters.
        answers.append(await engine.generate([request([3] * 50, key=77, max_new_tokens=10)]))
        assert engine.health().running == engine.health().waiting == 0
        return answers

    answers = run(disturb())
    for index, outputs in enumerate(answers[:11]):
        reasons = {out.finish_reason for out in outputs}
        assert ("abort" in reasons) == (index in {0, 1, 5, 9})
    assert len(answers[-1][0].output_ids) == 10


def wide_spec(policy: Policy) -> ArchSpec:
    """Keys of one position and head fill a quarter of a page, and so do values."""
    rope = policy.spec.layers[0].attention.rope
    attention = AttentionSpec(2, 2, 256, rope, qkv_bias=False, output_bias=False)
    layers = tuple(LayerSpec(attention, layer.mlp) for layer in policy.spec.layers[:2])
    return replace(policy.spec, layers=layers, max_position_embeddings=256)


def planned_cache(spec: ArchSpec, limits: EngineLimits) -> int:
    """What the plan says that the cache takes."""
    memory = estimate_memory(
        spec, "fp32", cached_tokens=limits.cached_tokens, micro_batch_tokens=1, reference=False
    )
    return next(part.bytes for part in memory.parts if part.name == "KV cache")


def resident_bytes(cache: KVCache) -> int:
    """Real memory behind the cache, from the kernel's account of the process."""
    wanted = {x.data_ptr() for x in (cache.keys, cache.values)}
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if "-" in fields[0] and not fields[0].endswith(":"):
            start, end = (int(edge, 16) for edge in fields[0].split("-"))
            inside = any(start <= address < end for address in wanted)
        elif fields[0] == "Rss:" and inside:
            total += int(fields[1]) * 1024
    return total


def test_without_a_bound_the_plan_has_the_size_of_the_cache(policy: Policy) -> None:
    cache = policy.engine(max_running_requests=12)._runner.cache
    assert planned_cache(policy.spec, EngineLimits(12, 16384, 12 * 64, 64)) == cache.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not take single pages back")
def test_memory_follows_the_tokens_and_not_the_slots(policy: Policy) -> None:
    spec = wide_spec(policy)
    wide = Policy(spec, make_decoder(spec))
    slots, context, bound = 64, 256, 600
    engine = wide.engine(max_running_requests=slots, max_context_len=context, max_total_tokens=bound)
    cache = engine._runner.cache
    planned = planned_cache(spec, EngineLimits(slots, 16384, bound, context))
    assert resident_bytes(cache) < 20 * PAGE, "nothing is taken before there are requests"

    async def generate_waves() -> int:
        highest = 0
        # A few long ones at first, then more and more short ones, which fill slots beside them.
        for count, length in ((5, 117), (10, 57), (40, 12)):
            calls = [[request([1, 2, 3], key=key, max_new_tokens=length)] for key in range(count)]
            tasks = [asyncio.create_task(engine.generate(call)) for call in calls]
            while not all(task.done() for task in tasks):
                if engine.metrics()["steps"] % 10 == 0:
                    highest = max(highest, resident_bytes(cache))
                await asyncio.sleep(0)
        return highest

    # A request of the plan rounds up by a page per layer and head, in its keys and in its values.
    rounding = 40 * 2 * 2 * len(spec.layers) * PAGE
    assert 0.5 * planned < run(generate_waves()) <= planned + rounding < cache.nbytes / 10
