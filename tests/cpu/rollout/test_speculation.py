"""Speculative decoding changes the speed of the engine and nothing that it says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from miles.arch.spec import ArchSpec, IndexerSpec, LatentSpec
from miles.models.invariance import find_exact_numerics
from miles.rollout.engine import GenerateOutput
from miles.rollout.native.break_even import BreakEven
from miles.rollout.native.draft import SpeculationSettings
from tests.cpu.rollout.conftest import Policy, generate_all, make_spec, prompt_groups, request, run
from tests.cpu.rollout.drafts import DrawingDraft, GuessingDraft, use_draft

STOPS = (3, 8, 21)
CHAIN = SpeculationSettings(algorithm="NGRAM", num_steps=3, num_draft_tokens=4)
TREE = SpeculationSettings(algorithm="NGRAM", num_steps=4, eagle_topk=3, num_draft_tokens=9)

SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 4, "temperature": 0.6},
    "top_p": {"top_p": 0.7, "temperature": 0.8},
    "min_new_tokens": {"min_new_tokens": 11, "temperature": 0.3},
}


def assert_same(plain: GenerateOutput, other: GenerateOutput, atol: float = 2e-5) -> None:
    assert other.output_ids == plain.output_ids
    assert other.finish_reason == plain.finish_reason
    assert other.weight_versions == plain.weight_versions
    assert other.cached_tokens == plain.cached_tokens
    np.testing.assert_array_equal(other.routed_experts, plain.routed_experts)
    np.testing.assert_allclose(other.log_probs, plain.log_probs, atol=atol, rtol=0)


def both(
    policy: Policy, calls: Sequence[Sequence[Any]], settings: SpeculationSettings, **engine: Any
) -> list:
    """(plain output, speculative output) of every request; the table has seen the answers once before."""
    plain = generate_all(policy.engine(**engine), calls)
    speculative = policy.engine(speculation=settings, **engine)
    generate_all(speculative, calls)
    answers = generate_all(speculative, calls)
    return [pair for one, other in zip(plain, answers, strict=True) for pair in zip(one, other, strict=True)]


@pytest.mark.parametrize("settings", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_certain_guesses_leave_every_token_as_it_is(
    policy: Policy, sampling: dict[str, Any], settings: SpeculationSettings
) -> None:
    calls = prompt_groups(4, 4, max_new_tokens=24, stop_token_ids=STOPS, **sampling)
    pairs = both(policy, calls, settings)
    for plain, speculative in pairs:
        assert_same(plain, speculative)
    infos = [speculative.spec_info for _, speculative in pairs]
    assert sum(info.accepted_tokens for info in infos) > 20, "the test is about accepted guesses"
    assert sum(info.accepted_tokens for info in infos) < sum(info.draft_tokens for info in infos)


@pytest.mark.parametrize(
    "settings", [pytest.param(CHAIN, marks=pytest.mark.slow), TREE], ids=["chain", "tree"]
)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param("moe", torch.float32, id="moe"),
        pytest.param("dense", torch.float32, id="dense", marks=pytest.mark.slow),
        pytest.param("windows", torch.float32, id="windows", marks=pytest.mark.slow),
        pytest.param("indexer", torch.float32, id="indexer", marks=pytest.mark.slow),
        pytest.param("moe", torch.bfloat16, id="moe in bf16", marks=pytest.mark.slow),
    ],
)
def test_exact_numerics_keep_every_bit(settings: SpeculationSettings, kind: str, dtype: torch.dtype) -> None:
    """Of log-probs and routes, accepted guesses among them. Long enough for several blocks of keys; requests
    end at different times and move between slots."""
    spec = replace(make_spec(kind == "moe"), max_position_embeddings=256)
    spec = {"windows": _in_windows, "indexer": _with_indexer}.get(kind, replace)(spec)
    numerics = find_exact_numerics(spec, dtype)
    policy = Policy.random(spec, numerics)
    policy.decoder.to(dtype)
    calls = [prompt_groups(1, 3, seed=i, max_new_tokens=20 + 60 * i, temperature=0.25)[0] for i in range(4)]
    calls = [
        [replace(r, group=g, sample_key=10 * g + i) for i, r in enumerate(c)] for g, c in enumerate(calls)
    ]
    pairs = both(policy, calls, settings, numerics=numerics, max_context_len=256, dtype=dtype)
    for plain, speculative in pairs:
        assert_same(plain, speculative, atol=0)
    assert sum(speculative.spec_info.accepted_tokens for _, speculative in pairs) > 100


def _with_indexer(spec: ArchSpec) -> ArchSpec:
    """Attention over latents, to the best keys of an indexer."""
    rope = replace(spec.layers[0].attention.rope, width=8)
    attention = replace(
        spec.layers[0].attention,
        num_kv_heads=1,
        head_dim=24,
        rope=rope,
        qk_norm=False,
        latent=LatentSpec(query_rank=24, kv_rank=16, plain_dim=16, rotated_dim=8, value_dim=16),
        indexer=IndexerSpec(num_heads=3, head_dim=12, top_k=20),
    )
    return replace(spec, layers=tuple(replace(layer, attention=attention) for layer in spec.layers))


def _in_windows(spec: ArchSpec) -> ArchSpec:
    """A window in all layers but one."""
    windowed, full, *rest = spec.layers
    windowed, *rest = (
        replace(layer, attention=replace(layer.attention, window=13)) for layer in (windowed, *rest)
    )
    return replace(spec, layers=(windowed, full, *rest))


def test_random_traffic_gets_the_answers_of_plain_decoding(policy: Policy) -> None:
    """Every request differs, arrives at its own time, and asks for its own number of guesses."""
    rng = np.random.default_rng(0)
    kinds = list(SAMPLING.values())
    calls = []
    for g in range(12):
        kind = kinds[rng.integers(len(kinds))]
        (call,) = prompt_groups(
            1,
            int(rng.integers(1, 5)),
            seed=g,
            stop_token_ids=STOPS,
            **{**kind, "max_new_tokens": int(rng.integers(11, 30))},
        )
        steps = [None, 0, 1, 2][int(rng.integers(4))]
        calls.append(
            [
                replace(r, group=g, sample_key=100 * g + i, speculative_num_steps=steps)
                for i, r in enumerate(call)
            ]
        )
    expected = generate_all(policy.engine(), calls)

    async def traffic(settings: SpeculationSettings) -> list[list[GenerateOutput]]:
        engine = policy.engine(max_running_requests=7, max_prefill_tokens=20, speculation=settings)

        async def late(call: Sequence[Any], turns: int) -> list[GenerateOutput]:
            for _ in range(turns):
                await asyncio.sleep(0)
            return await engine.generate(call)

        return await asyncio.gather(*(late(call, 3 * i) for i, call in enumerate(calls)))

    for settings in (CHAIN, TREE):
        for call, one, other in zip(calls, expected, run(traffic(settings)), strict=True):
            for req, plain, speculative in zip(call, one, other, strict=True):
                assert_same(plain, speculative)
                assert (speculative.spec_info is None) == (req.speculative_num_steps == 0)


def test_a_stop_id_inside_an_accepted_run_ends_the_response(policy: Policy) -> None:
    """A draft that knows the future guesses beyond the stop id; the response ends with it all the same."""
    (call,) = prompt_groups(1, 6, max_new_tokens=20, temperature=0.5)
    free = run(policy.engine().generate(call))
    for index, output in enumerate(free):
        stop = output.output_ids[7]
        asked = replace(call[index], sampling=replace(call[index].sampling, stop_token_ids=(stop,)))
        engine = policy.engine(speculation=CHAIN)
        use_draft(engine, GuessingDraft(engine, [*asked.input_ids, *output.output_ids]))
        (answer,) = run(engine.generate([asked]))
        first = output.output_ids.index(stop) + 1
        assert answer.output_ids == output.output_ids[:first]
        assert answer.finish_reason == "stop"
        info = answer.spec_info
        assert info is not None and info.accepted_tokens + info.verify_steps >= first - 1


def test_counters_add_up(policy: Policy) -> None:
    """A draft that is right: all guesses stand, and the last run is as short as the limit makes it."""
    asked = request([4, 5, 6], max_new_tokens=12)
    (plain,) = run(policy.engine().generate([asked]))
    engine = policy.engine(speculation=CHAIN)
    use_draft(engine, GuessingDraft(engine, [*asked.input_ids, *plain.output_ids]))
    (answer,) = run(engine.generate([asked]))
    assert_same(plain, answer)
    info = answer.spec_info
    # One token from the prompt, then 4 + 4 + 3 of three verifications.
    assert info is not None
    assert (info.verify_steps, info.draft_tokens, info.accepted_tokens) == (3, 8, 8)
    assert info.tried == info.accepted == [3, 3, 2]
    assert engine.metrics()["generated_tokens"] == 12


def test_guesses_that_always_fall_leave_plain_decoding(policy: Policy) -> None:
    asked = request([4, 5, 6], max_new_tokens=12)
    (plain,) = run(policy.engine().generate([asked]))
    engine = policy.engine(speculation=CHAIN)
    wrong = [(token + 1) % 37 for token in plain.output_ids]
    use_draft(engine, GuessingDraft(engine, [*asked.input_ids, *wrong]))
    (answer,) = run(engine.generate([asked]))
    assert_same(plain, answer)
    info = answer.spec_info
    assert info is not None and info.accepted_tokens == 0 and info.verify_steps == 11
    assert info.tried == [10, 0, 0] and info.accepted == [0, 0, 0]


def test_a_version_and_an_abort_between_steps_keep_whole_tokens(policy: Policy) -> None:
    asked = request([4, 5, 6], max_new_tokens=40, group=3)

    async def interrupted() -> GenerateOutput:
        engine = policy.engine(speculation=CHAIN)
        task = asyncio.create_task(engine.generate([asked]))
        while engine.metrics()["generated_tokens"] < 9:
            await asyncio.sleep(0)
        await engine.share_weights(policy.decoder, version=1)
        while engine.metrics()["generated_tokens"] < 20:
            await asyncio.sleep(0)
        await engine.abort({3})
        return (await task)[0]

    answer = run(interrupted())
    (plain,) = run(policy.engine().generate([asked]))
    assert answer.finish_reason == "abort"
    assert answer.output_ids == plain.output_ids[: len(answer.output_ids)]
    assert [version for version, _ in answer.weight_versions] == [0, 1]
    assert 9 <= answer.weight_versions[1][1] < 20


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_drawn_guesses_do_not_depend_on_the_batch(policy: Policy, temperature: float) -> None:
    """Rejection has streams of its own: the same request draws the same tokens alone and among others."""
    calls = prompt_groups(5, 3, max_new_tokens=14, stop_token_ids=STOPS, temperature=temperature)

    def answers(calls: Sequence[Sequence[Any]], **settings: Any) -> list[list[GenerateOutput]]:
        engine = policy.engine(speculation=CHAIN, **settings)
        use_draft(engine, DrawingDraft(engine))
        return generate_all(engine, calls)

    together, narrow = answers(calls), answers(calls, max_running_requests=4)
    for call, one, other in zip(calls, together, narrow, strict=True):
        for a, b, alone in zip(one, other, answers([call])[0], strict=True):
            assert_same(a, b)
            assert_same(a, alone)
    if temperature == 0:
        for one, other in zip(together, generate_all(policy.engine(), calls), strict=True):
            for a, b in zip(one, other, strict=True):
                assert_same(b, a)


def test_drawn_guesses_get_the_log_probs_and_routes_of_a_plain_forward(policy: Policy) -> None:
    calls = prompt_groups(4, 4, max_new_tokens=16, temperature=0.8)
    engine = policy.engine(speculation=CHAIN)
    use_draft(engine, DrawingDraft(engine))
    outputs = [out for call in generate_all(engine, calls) for out in call]
    requests = [req for call in calls for req in call]
    sequences = [[*r.input_ids, *o.output_ids] for r, o in zip(requests, outputs, strict=True)]
    log_probs, routes = policy.packed(sequences, temperature=0.8)
    for req, out, expected, route in zip(requests, outputs, log_probs, routes, strict=True):
        rows = expected[len(req.input_ids) - 1 :]
        sampled = rows.gather(1, torch.tensor(out.output_ids)[:, None]).squeeze(1)
        np.testing.assert_allclose(out.log_probs, sampled.numpy(), atol=1e-5, rtol=0)
        np.testing.assert_array_equal(out.routed_experts, route)
    assert sum(out.spec_info.accepted_tokens for out in outputs if out.spec_info) > 10


def test_the_break_even_compares_pairs_of_steps() -> None:
    """Only steps with a plain one beside them count, and later pairs count more."""
    balance = BreakEven()
    assert balance.metrics() == {}
    measured = [step for step in range(1, 30) if balance.due()]
    assert measured == [4, 16, 28]
    balance.speculated(1000, 0.001)
    assert balance.metrics() == {}, "no plain step stood beside it"
    for _ in range(3):
        assert balance.metrics() == {}, "one or two pairs say little"
        balance.plain(8, 1.0)
        balance.speculated(24, 2.0)
    assert balance.metrics()["spec_speedup"] == pytest.approx(12 / 8)
    for _ in range(50):
        balance.plain(8, 1.0)
        balance.speculated(8, 2.0)
    assert balance.metrics()["spec_speedup"] == pytest.approx(0.5, abs=0.01)


def test_a_plain_step_is_measured_and_changes_no_token(policy: Policy) -> None:
    asked = request([4, 5, 6], max_new_tokens=60)
    (plain,) = run(policy.engine().generate([asked]))
    engine = policy.engine(speculation=replace(CHAIN, num_steps=1, num_draft_tokens=2))
    use_draft(engine, GuessingDraft(engine, [*asked.input_ids, *plain.output_ids]))
    (answer,) = run(engine.generate([asked]))
    assert_same(plain, answer)
    assert engine.metrics()["spec_speedup"] > 0
