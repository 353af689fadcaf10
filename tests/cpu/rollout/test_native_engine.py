"""What the native engine returns: equal to a packed forward, the same whatever shares the batch."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
import torch

from miles.errors import ConfigError, RunError
from miles.rollout.engine import GenerateOutput, RequestRefused, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from tests.cpu.rollout.conftest import (
    Policy,
    generate_all,
    make_decoder,
    make_spec,
    now,
    prompt_groups,
    request,
    run,
)

STOPS = (3, 8, 21)


def assert_same(a: GenerateOutput, b: GenerateOutput) -> None:
    """Same tokens and routes; log-probs up to the rounding of differently shaped matrix products."""
    assert a.output_ids == b.output_ids
    assert a.finish_reason == b.finish_reason
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(a.routed_experts, b.routed_experts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_routes_equal_a_packed_forward(policy: Policy, temperature: float) -> None:
    calls = prompt_groups(6, 4, max_new_tokens=20, stop_token_ids=STOPS, temperature=temperature)
    outputs = generate_all(policy.engine(), calls)
    pairs = [
        (req, out)
        for call, outs in zip(calls, outputs, strict=True)
        for req, out in zip(call, outs, strict=True)
    ]
    assert len({len(out.output_ids) for _, out in pairs}) > 3, "lengths must differ to move slots"
    sequences = [[*req.input_ids, *out.output_ids] for req, out in pairs]
    log_probs, routes = policy.packed(sequences, temperature)
    for (req, out), expected, route in zip(pairs, log_probs, routes, strict=True):
        rows = expected[len(req.input_ids) - 1 :]
        sampled = rows.gather(1, torch.tensor(out.output_ids)[:, None]).squeeze(1)
        np.testing.assert_allclose(out.log_probs, sampled.numpy(), atol=1e-5, rtol=0)
        assert out.log_probs.dtype == np.float32
        assert out.routed_experts is not None and out.routed_experts.dtype == np.int16
        np.testing.assert_array_equal(out.routed_experts, route)
        assert out.weight_versions == [(0, 0)]


def test_answers_do_not_depend_on_batch_composition_order_or_slots(policy: Policy) -> None:
    calls = prompt_groups(8, 3, max_new_tokens=14, stop_token_ids=STOPS)
    together = generate_all(policy.engine(), calls)
    one_slot = generate_all(policy.engine(max_running_requests=1), calls)
    five_slots = generate_all(policy.engine(max_running_requests=5, max_prefill_tokens=9), calls)
    order = list(range(len(calls)))
    random.Random(3).shuffle(order)
    shuffled = generate_all(policy.engine(), [list(reversed(calls[i])) for i in order])
    for i, expected in enumerate(together):
        alone = run(policy.engine().generate(calls[i]))
        for others in (one_slot[i], five_slots[i], list(reversed(shuffled[order.index(i)])), alone):
            for a, b in zip(expected, others, strict=True):
                assert_same(a, b)


def test_parameters_of_a_request_stay_with_it_when_it_changes_slots(policy: Policy) -> None:
    """Every request differs from its neighbours, and short ones make the long ones move."""
    settings: list[dict[str, object]] = [
        {"top_k": 2},
        {"temperature": 0.0},
        {"top_p": 0.4},
        {"min_new_tokens": 15, "stop_token_ids": tuple(range(2, 36))},
        {"temperature": 2.5, "stop_token_ids": (1, 36)},
        {"top_k": 5, "temperature": 0.3},
        {"stop_token_ids": (9,)},
    ]
    short = [request([key, 5], key=key, max_new_tokens=1 + key % 3) for key in range(12)]
    long = [
        request([key, 5], key=key, **{"max_new_tokens": 16, **settings[key % 7]})  # type: ignore[arg-type]
        for key in range(12, 33)
    ]
    call = [*short, *long]
    for each, together in zip(call, run(policy.engine().generate(call)), strict=True):
        assert_same(run(policy.engine().generate([each]))[0], together)


def test_requests_may_arrive_while_others_run(policy: Policy) -> None:
    early, late = prompt_groups(2, 4, max_new_tokens=12)

    async def staggered() -> tuple[list[GenerateOutput], list[GenerateOutput]]:
        engine = policy.engine(max_running_requests=6)
        first = asyncio.create_task(engine.generate(early))
        while engine.metrics()["steps"] < 5:
            await asyncio.sleep(0)
        assert engine.health().running == 4
        return await first, await engine.generate(late)

    first, second = run(staggered())
    expected = generate_all(policy.engine(), [early, late])
    for a, b in zip([*first, *second], [*expected[0], *expected[1]], strict=True):
        assert_same(a, b)


def test_another_seed_or_key_gives_another_sample(policy: Policy) -> None:
    def draw(seed: int, key: int) -> list[int]:
        return run(policy.engine(seed=seed).generate([request([1, 2, 3], key=key, max_new_tokens=16)]))[
            0
        ].output_ids

    assert draw(1, 0) == draw(1, 0)
    assert len({tuple(draw(seed, key)) for seed in (1, 2) for key in (0, 1)}) == 4


def test_a_group_is_prefilled_once_and_equals_unshared_requests(policy: Policy) -> None:
    calls = prompt_groups(4, 5, max_new_tokens=10, stop_token_ids=STOPS)
    prompt_tokens = sum(len(call[0].input_ids) for call in calls)
    sharing, separate = policy.engine(), policy.engine()
    shared = generate_all(sharing, calls)
    alone = generate_all(
        separate,
        [
            [request(r.input_ids, r.sample_key, None, max_new_tokens=10, stop_token_ids=STOPS) for r in c]
            for c in calls
        ],
    )
    assert sharing.metrics()["prefilled_tokens"] == prompt_tokens
    assert sharing.metrics()["cached_tokens"] == 4 * prompt_tokens
    assert separate.metrics()["prefilled_tokens"] == 5 * prompt_tokens
    for call, with_sharing, without in zip(calls, shared, alone, strict=True):
        length = len(call[0].input_ids)
        assert [out.cached_tokens for out in with_sharing] == [0, length, length, length, length]
        assert [out.cached_tokens for out in without] == [0] * 5
        for a, b in zip(with_sharing, without, strict=True):
            assert_same(a, b)


def test_a_group_split_over_admissions_is_still_prefilled_once(policy: Policy) -> None:
    (call,) = prompt_groups(1, 7, max_new_tokens=6)
    engine = policy.engine(max_running_requests=3)
    outputs = generate_all(engine, [call])[0]
    assert engine.metrics()["prefilled_tokens"] == len(call[0].input_ids)
    for a, b in zip(outputs, generate_all(policy.engine(), [call])[0], strict=True):
        assert_same(a, b)


def test_responses_end_at_a_stop_id_or_at_their_own_limit(policy: Policy) -> None:
    limits = [1, 2, 5, 9, 17]
    calls = [
        [request([4, 5, 6], key=k, max_new_tokens=n, stop_token_ids=STOPS) for k in range(12)] for n in limits
    ]
    reasons = set()
    for limit, outputs in zip(limits, generate_all(policy.engine(), calls), strict=True):
        for out in outputs:
            assert not set(out.output_ids[:-1]) & set(STOPS), "nothing follows a stop id"
            stopped = out.output_ids[-1] in STOPS
            assert out.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(out.output_ids) == limit
            assert len(out.log_probs) == len(out.output_ids) <= limit
            reasons.add(out.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_stop_id_on_the_last_allowed_token_is_a_stop(policy: Policy) -> None:
    (first,) = run(policy.engine().generate([request([4, 5], max_new_tokens=1)]))
    again = request([4, 5], max_new_tokens=1, stop_token_ids=tuple(first.output_ids))
    assert run(policy.engine().generate([again]))[0].finish_reason == "stop"


def test_min_new_tokens_holds_back_stop_ids_of_that_request_only(policy: Policy) -> None:
    every_id_but_two = tuple(range(2, 37))
    held = [
        request([7, 7], key=k, max_new_tokens=9, min_new_tokens=6, stop_token_ids=every_id_but_two)
        for k in range(8)
    ]
    free = [request([7, 7], key=k, max_new_tokens=9, stop_token_ids=every_id_but_two) for k in range(8)]
    held_out, free_out = generate_all(policy.engine(), [held, free])
    assert all(len(out.output_ids) >= 6 for out in held_out)
    assert all(set(out.output_ids[:6]) <= {0, 1} or len(out.output_ids) == 6 for out in held_out)
    assert min(len(out.output_ids) for out in free_out) == 1


def test_greedy_is_the_argmax_of_a_packed_forward(policy: Policy) -> None:
    hot = request([5, 6], key=1, temperature=2.0, max_new_tokens=16)
    (out, _) = run(policy.engine().generate([request([9, 8, 7], temperature=0.0, max_new_tokens=16), hot]))
    (log_probs,), _ = policy.packed([[9, 8, 7, *out.output_ids]])
    assert out.output_ids == log_probs[2:].argmax(dim=-1).tolist()
    np.testing.assert_allclose(out.log_probs, log_probs[2:].max(dim=-1).values.numpy(), atol=1e-5, rtol=0)


def test_sampled_frequencies_follow_the_policy(policy: Policy) -> None:
    """First tokens of many samples of one prompt against the forward's distribution, top-k applied."""
    num, top_k = 4000, 6
    call = [request([3, 1, 4], key=k, group=0, max_new_tokens=1, top_k=top_k) for k in range(num)]
    drawn = [out.output_ids[0] for out in run(policy.engine().generate(call))]
    (log_probs,), _ = policy.packed([[3, 1, 4, 0]])
    kept = log_probs[2].exp().topk(top_k)
    expected = num * kept.values / kept.values.sum()
    observed = torch.bincount(torch.tensor(drawn), minlength=37)[kept.indices]
    assert observed.sum() == num
    assert float(((observed - expected) ** 2 / expected).sum()) < 20.5, "99.9 % of chi-square with 5"


def test_dense_models_have_no_routes() -> None:
    spec = make_spec(moe=False)
    dense = Policy(spec, make_decoder(spec))
    (out,) = run(dense.engine().generate([request([1, 2, 3], max_new_tokens=5)]))
    (log_probs,), _ = dense.packed([[1, 2, 3, *out.output_ids]])
    sampled = log_probs[2:].gather(1, torch.tensor(out.output_ids)[:, None]).squeeze(1)
    np.testing.assert_allclose(out.log_probs, sampled.numpy(), atol=1e-5, rtol=0)
    assert out.routed_experts is None


def test_routes_are_left_out_when_not_asked_for(policy: Policy) -> None:
    wanted = request([1, 2], key=1)
    unwanted = type(wanted)(
        input_ids=[1, 2], sampling=wanted.sampling, sample_key=2, return_routed_experts=False
    )
    outputs = run(policy.engine().generate([wanted, unwanted]))
    assert outputs[0].routed_experts is not None and outputs[1].routed_experts is None


@pytest.mark.parametrize(
    ("bad", "numbers"),
    [
        (request([1] * 60, max_new_tokens=5), ("60", "5", "65", "64")),
        (request([1, 37]), ("37", "36")),
        (request([1], stop_token_ids=(99,)), ("99", "36")),
        (request([]), ("empty prompt",)),
    ],
)
def test_an_unfit_request_is_refused_with_its_numbers_and_the_engine_goes_on(
    policy: Policy, bad: object, numbers: tuple[str, ...]
) -> None:
    engine = policy.engine()
    with pytest.raises(RequestRefused) as refusal:
        run(engine.generate([request([1]), bad]))  # type: ignore[list-item]
    assert all(number in str(refusal.value) for number in numbers)
    assert engine.health().waiting == 0, "nothing of a refused call is started"
    assert len(run(engine.generate([request([1] * 56)]))[0].output_ids) == 8


@pytest.mark.parametrize(
    "params",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": 0},
        {"min_new_tokens": 99},
        {"stop_token_ids": (-1,)},
    ],
)
def test_meaningless_sampling_parameters_are_refused_by_name(params: dict[str, object]) -> None:
    with pytest.raises(RequestRefused, match=next(iter(params))):
        SamplingParams(**{"max_new_tokens": 8, **params})  # type: ignore[arg-type]


def test_more_context_than_positions_is_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="96"):
        NativeEngine(policy.spec, EngineSettings(max_context_len=97, seed=0))


def test_generating_without_weights_is_refused(policy: Policy) -> None:
    engine = NativeEngine(policy.spec, EngineSettings(max_context_len=64, seed=0))
    assert not engine.health().ok
    with pytest.raises(RunError, match="not received weights"):
        run(engine.generate([request([1])]))


def test_non_finite_logits_fail_every_caller_and_name_the_place(policy: Policy) -> None:
    broken = make_decoder(policy.spec, seed=5)
    broken.final_norm[0] = float("nan")
    engine = policy.engine()
    now(engine.share_weights(broken, version=7))
    with pytest.raises(RunError, match=r"weight version 7, sample key \d+, position 2"):
        generate_all(engine, [[request([1, 2], key=4)], [request([3, 4], key=5)]])
    assert not engine.health().ok
    now(engine.share_weights(policy.decoder, version=8))
    assert engine.health().ok
    assert len(run(engine.generate([request([1])]))) == 1
