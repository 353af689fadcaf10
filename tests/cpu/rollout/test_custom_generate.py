"""The generation hook, and turns of policy and tool: tokens, masks, log-probs and routes of a dialogue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from miles.data.hooks import HookError
from miles.data.sample import Sample, SampleStatus
from miles.rollout.collect import CollectSettings, Group, collect
from miles.rollout.custom import Surroundings, generate_group_with
from miles.rollout.engine import RequestRefused, SamplingParams
from miles.rollout.generate import GenerationSettings
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.rollout.tool_turns import tool_turns
from tests.cpu.rollout.conftest import Policy, now, run

STOPS = tuple(range(0, 37, 3))
"""A third of the vocabulary, so that turns are short."""
SETTINGS = GenerationSettings(
    sampling=SamplingParams(max_new_tokens=40, stop_token_ids=STOPS), max_context_len=64
)
TOOL_IDS = [1, 2, 4]


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def encode(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def group_of(size: int = 4, index: int = 3) -> Group:
    return [
        Sample(prompt="", tokens=[5, 7, 11], group_index=index, index=10 * index + i) for i in range(size)
    ]


def around(engine: NativeEngine) -> Surroundings:
    return Surroundings(config="the run file", engine=engine, encode=encode, decode=decode)


def generate(engine: NativeEngine, hook, group: Sequence[Sample] | None = None, settings=SETTINGS) -> Group:
    return run(generate_group_with(hook, group or group_of(), around(engine), settings, rollout_id=0))


def test_a_function_of_the_user_makes_each_sample_and_knows_the_run(policy: Policy) -> None:
    seen = []

    async def once(args, sample, sampling_params):
        seen.append((args.config, sampling_params["temperature"]))
        return await args.generate(sample, sampling_params)

    engine = policy.engine(max_running_requests=4)
    samples = generate(engine, once)
    assert seen == [("the run file", 1.0)] * 4
    assert all(sample.status is SampleStatus.COMPLETED for sample in samples)
    assert len({tuple(sample.tokens) for sample in samples}) > 1, "members draw their own numbers"
    assert engine.metrics()["prefilled_tokens"] == 3, "the prompt of the group is read once"


def test_tool_output_is_context_and_every_row_before_the_last_token_has_a_route(policy: Policy) -> None:
    heard = []

    async def tool(text: str) -> str | None:
        heard.append(text)
        await asyncio.sleep(0)
        return decode(TOOL_IDS)

    samples = generate(policy.engine(), tool_turns(tool, max_outputs=2), group_of(8))
    longest = max(samples, key=lambda sample: sample.response_length)
    assert longest.status in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)
    told = [s for s in samples if s.loss_mask and s.loss_mask.count(0) == 2 * len(TOOL_IDS)]
    assert told, "some response heard the tool twice"
    for sample in samples:
        assert sample.rollout_log_probs is not None and sample.loss_mask is not None
        unsampled = np.isnan(sample.rollout_log_probs)
        assert (unsampled == (np.array(sample.loss_mask) == 0)).all()
        response = np.array(sample.tokens[3:])
        assert response[unsampled].tolist() == TOOL_IDS * (int(unsampled.sum()) // len(TOOL_IDS))
        (log_probs,), (routes,) = policy.packed([sample.tokens])
        np.testing.assert_array_equal(sample.rollout_routed_experts, routes)
        rows = log_probs[np.arange(2, len(sample.tokens) - 1), sample.tokens[3:]].numpy()
        np.testing.assert_allclose(sample.rollout_log_probs[~unsampled], rows[~unsampled], atol=1e-5)
        assert sample.non_generation_time > 0
    assert len(heard) == sum(s.loss_mask.count(0) for s in samples if s.loss_mask) // len(TOOL_IDS)


def test_a_turn_is_told_to_the_tool_without_the_token_that_ended_it(policy: Policy) -> None:
    heard = []

    def tool(text: str) -> str | None:
        heard.append(text)
        return None

    (sample,) = generate(policy.engine(), tool_turns(tool, max_outputs=1), group_of(1))
    assert heard == [decode(sample.tokens[3:-1])] and sample.loss_mask is None


def test_a_turn_that_a_stop_string_ended_is_told_whole(policy: Policy) -> None:
    """As a call of a tool is: the string that closes it is part of it. A turn may have strings of its own."""
    heard = []
    engine = NativeEngine(policy.spec, EngineSettings(max_context_len=64, seed=11), decode)
    now(engine.share_weights(policy.decoder, version=0))

    def tool(text: str) -> str | None:
        heard.append(text)
        return decode(TOOL_IDS) if len(heard) == 1 else None

    only = {"stop": ["2", "3"], "stop_token_ids": ()}

    async def stopping(args, sample, sampling_params):
        return await tool_turns(tool, max_outputs=2)(args, sample, only)

    (sample,) = generate(engine, stopping, group_of(1))
    first, second = heard
    for said in heard:
        *before, last = said.split()
        assert set("23") & set(last) and not any(set("23") & set(word) for word in before)
    assert sample.stop_string in second and sample.status is SampleStatus.COMPLETED
    assert sample.response == " ".join([first, decode(TOOL_IDS), second])


def test_all_turns_together_stay_inside_the_limits(policy: Policy) -> None:
    def long_winded(text: str) -> str:
        return decode(TOOL_IDS * 4)

    settings = replace(SETTINGS, sampling=replace(SETTINGS.sampling, max_new_tokens=20))
    samples = generate(policy.engine(), tool_turns(long_winded, max_outputs=9), group_of(8), settings)
    assert all(sample.response_length <= 20 for sample in samples)
    assert all(sample.status is SampleStatus.TRUNCATED for sample in samples)


def test_a_dialogue_that_is_cut_off_in_a_later_turn_goes_on_where_it_was(policy: Policy) -> None:
    """Two of four groups are wanted: the tool keeps the others waiting until those are there."""

    async def scenario() -> tuple[list[Group], list[Group]]:
        gate = asyncio.Event()
        engine = policy.engine()

        async def slow_tool(text: str) -> str | None:
            await gate.wait()
            return decode(TOOL_IDS)

        async def fast(args, sample, sampling_params):
            return await args.generate(sample, sampling_params)

        turns = tool_turns(slow_tool, max_outputs=3)

        async def one(group: Sequence[Sample]) -> Group:
            hook = fast if group[0].group_index in (0, 1) else turns
            filled = await generate_group_with(hook, group, around(engine), SETTINGS, 0)
            gate.set()
            return filled

        async def judge(group: Sequence[Sample]) -> list[float]:
            return [0.0] * len(group)

        drawn = [group_of(2, index) for index in range(4)]
        limits = CollectSettings(rollout_batch_size=2, over_sampling_batch_size=4, keep_unused=True)
        first = await collect(engine, lambda _: drawn, one, judge, limits)
        rest = [await generate_group_with(turns, g, around(engine), SETTINGS, 1) for g in first.unused]
        return first.unused, rest

    kept, finished = run(scenario())
    assert [group[0].group_index for group in kept] == [2, 3]
    assert any(sample.status is SampleStatus.ABORTED for group in kept for sample in group)
    for before, after in zip((s for g in kept for s in g), (s for g in finished for s in g), strict=True):
        assert after.tokens[: len(before.tokens)] == before.tokens
        assert after.status in (SampleStatus.COMPLETED, SampleStatus.TRUNCATED)
        (routes,) = policy.packed([after.tokens])[1]
        np.testing.assert_array_equal(after.rollout_routed_experts, routes)


async def returns_nothing(args, sample, sampling_params):
    return None


async def returns_the_prompt(args, sample, sampling_params):
    return sample


async def rewrites_the_prompt(args, sample, sampling_params):
    done = await args.generate(sample, sampling_params)
    return replace(done, tokens=[9, *done.tokens[1:]])


async def returns_a_sibling(args, sample, sampling_params):
    return replace(await args.generate(sample), index=99)


async def raises(args, sample, sampling_params):
    raise KeyError("calculator")


async def misspells(args, sample, sampling_params):
    return await args.generate(sample, {"temprature": 1.0})


async def cools_down(args, sample, sampling_params):
    return await args.generate(sample, sampling_params | {"temperature": 0.5})


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (returns_nothing, "returned NoneType, not a Sample"),
        (returns_the_prompt, "returned a pending sample"),
        (rewrites_the_prompt, "changed the prompt"),
        (returns_a_sibling, "another sample"),
        (raises, "user function raises failed"),
        (misspells, "unknown sampling parameters: temprature"),
        (cools_down, "a turn at temperature 0.5 in a run at 1"),
    ],
)
def test_a_function_that_breaks_the_contract_is_told_so(hook, message, policy: Policy) -> None:
    with pytest.raises(HookError, match=message):
        generate(policy.engine(), hook, group_of(1))


def test_what_the_engine_refuses_is_not_blamed_on_the_function(policy: Policy) -> None:
    async def once(args, sample, sampling_params):
        return await args.generate(sample, sampling_params)

    full = [Sample(prompt="", tokens=[1] * 64, group_index=0, index=0)]
    with pytest.raises(RequestRefused, match="leaves no room"):
        generate(policy.engine(), once, full)


def test_a_tool_that_returns_no_text_is_blamed(policy: Policy) -> None:
    with pytest.raises(HookError, match="returned int"):
        generate(policy.engine(), tool_turns(lambda text: 3, max_outputs=1), group_of(4))  # type: ignore[arg-type,return-value]
