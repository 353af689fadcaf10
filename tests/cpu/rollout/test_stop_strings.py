"""A response ends at the first token after which its text contains a stop string, however it was sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from miles.rollout.engine import GenerateOutput, GenerateRequest, RequestRefused
from miles.rollout.native.draft import SpeculationSettings
from miles.rollout.native.engine import EngineSettings, NativeEngine
from tests.cpu.rollout.conftest import Policy, now, prompt_groups, request, run
from tests.cpu.rollout.drafts import GuessingDraft, use_draft
from tests.cpu.rollout.test_decode_kernel import library, needs_compiler  # noqa: F401

PIECES = [b"a", b"b", b"c", b"\xc3", b"\xa9", b"ab", b"\n"]
"""What an id says, by its remainder: letters, halves of one, and a pair: strings begin inside tokens."""
CHAIN = SpeculationSettings(algorithm="NGRAM", num_steps=3, num_draft_tokens=4)
KERNEL = pytest.param("kernel", marks=needs_compiler)


def decode(ids: Sequence[int]) -> str:
    return b"".join(PIECES[i % len(PIECES)] for i in ids).decode("utf-8", "replace")


def engine_of(policy: Policy, kind: str, request: pytest.FixtureRequest) -> NativeEngine:
    settings: dict[str, Any] = {"torch": {}, "guesses": {"speculation": CHAIN}}.get(kind, {})
    if kind == "kernel":
        settings = {"decode_library": request.getfixturevalue("library")}
    return served(policy, decode, **settings)


def served(policy: Policy, reading: Any, **settings: Any) -> NativeEngine:
    engine = NativeEngine(policy.spec, EngineSettings(max_context_len=64, seed=11, **settings), reading)
    now(engine.share_weights(policy.decoder, version=0))
    return engine


def ended(free: GenerateOutput, stop: tuple[str, ...]) -> tuple[list[int], str | None]:
    """What is left of a response that nothing stopped, and what ends it, from the definition."""
    for length in range(1, len(free.output_ids) + 1):
        text = decode(free.output_ids[:length])
        for string in stop:
            if string in text:
                return free.output_ids[:length], string
    return free.output_ids, None


def stopping(asked: GenerateRequest, *stop: str, **changes: Any) -> GenerateRequest:
    return replace(asked, sampling=replace(asked.sampling, stop=stop), **changes)


@pytest.mark.parametrize("kind", ["torch", "guesses", KERNEL])
def test_a_response_ends_where_its_text_first_holds_a_stop_string(
    policy: Policy, kind: str, request: pytest.FixtureRequest
) -> None:
    """Strings of one token, of several, of half a token and of two halves; other requests have none."""
    groups = prompt_groups(4, 4, seed=1, max_new_tokens=20)
    free = [output for g in groups for output in run(policy.engine().generate(g))]
    stops = [("é", "ca"), ("ba",), (), ("cab", "\n")]
    asked = [stopping(r, *stops[i]) for g in groups for i, r in enumerate(g)]
    engine = engine_of(policy, kind, request)
    run(engine.generate(asked))  # guesses come from what was said before
    found = set()
    for wanted, said, answer in zip(asked, free, run(engine.generate(asked)), strict=True):
        tokens, string = ended(said, wanted.sampling.stop)
        assert answer.output_ids == tokens and answer.stop_string == string
        assert answer.finish_reason == ("length" if string is None else "stop")
        np.testing.assert_allclose(answer.log_probs, said.log_probs[: len(tokens)], atol=2e-5)
        rows = len(wanted.input_ids) + len(tokens) - 1
        assert answer.routed_experts is not None and said.routed_experts is not None
        np.testing.assert_array_equal(answer.routed_experts, said.routed_experts[:rows])
        found.add(string)
    assert found >= {"ba", "é", "cab", "\n", None}, "the test is about strings of every kind"
    generated = engine.metrics()["generated_tokens"]
    assert generated == 2 * sum(len(ended(s, w.sampling.stop)[0]) for s, w in zip(free, asked, strict=True))


def test_the_prompt_is_no_part_of_the_response(policy: Policy) -> None:
    """The prompt ends with a letter, the response begins with the other: the pair is not in the response."""
    (free,) = run(policy.engine().generate([request([4, 5, 6], max_new_tokens=5)]))
    straddling = decode([6, *free.output_ids[:1]])
    engine = served(policy, decode)
    (alone,) = run(engine.generate([stopping(request([4, 5, 6], max_new_tokens=5), straddling)]))
    assert alone.output_ids == ended(free, (straddling,))[0] and len(alone.output_ids) > 1


def test_a_response_that_goes_on_remembers_what_it_began_to_say(policy: Policy) -> None:
    asked = request([4, 5, 6, 3], max_new_tokens=5)
    (free,) = run(policy.engine().generate([asked]))
    straddling = decode([3, *free.output_ids[:1]])
    (again,) = run(served(policy, decode).generate([stopping(asked, straddling, response_so_far=1)]))
    assert again.output_ids == free.output_ids[:1] and again.stop_string == straddling


def test_a_guess_beyond_the_match_is_cut_and_not_counted(policy: Policy) -> None:
    asked = request([4, 5, 6], max_new_tokens=20)
    (free,) = run(policy.engine().generate([asked]))
    string = decode(free.output_ids)[6:8]
    tokens, _ = ended(free, (string,))
    engine = served(policy, decode, speculation=CHAIN)
    use_draft(engine, GuessingDraft(engine, [*asked.input_ids, *free.output_ids]))
    (answer,) = run(engine.generate([stopping(asked, string)]))
    assert answer.output_ids == tokens and len(tokens) % 4 != 1, "the match is inside a run of four"
    info = answer.spec_info
    # One token from the prompt; every verification gives four, of which the last keeps no token of its own.
    assert info is not None and info.verify_steps == -(-(len(tokens) - 1) // 4)
    assert info.accepted_tokens == len(tokens) - info.verify_steps


def test_a_stop_id_that_says_the_string_is_what_ended_the_response(policy: Policy) -> None:
    (free,) = run(policy.engine().generate([request([4, 5, 6], max_new_tokens=9)]))
    last = free.output_ids[0]
    asked = stopping(request([4, 5, 6], max_new_tokens=9, stop_token_ids=(last,)), decode([last]))
    (answer,) = run(served(policy, decode).generate([asked]))
    assert (answer.output_ids, answer.finish_reason, answer.stop_string) == ([last], "stop", None)


@pytest.mark.parametrize("kind", ["torch", "guesses", KERNEL])
def test_nothing_is_read_where_nobody_has_a_stop_string(
    policy: Policy, kind: str, request: pytest.FixtureRequest
) -> None:
    engine = engine_of(policy, kind, request)
    engine._batch.stop_strings._windows = None  # type: ignore[assignment,method-assign]
    (group,) = prompt_groups(1, 4, max_new_tokens=12)
    assert all(len(output.output_ids) == 12 for output in run(engine.generate(group)))


def test_an_engine_without_a_tokenizer_refuses_stop_strings(policy: Policy) -> None:
    with pytest.raises(RequestRefused, match="stop = \\['END'\\]") as refused:
        run(policy.engine().generate([stopping(request([1]), "END")]))
    assert "tokenizer" in refused.value.why


@pytest.mark.parametrize("stop", [("",), ["END"], "END"])
def test_stop_strings_are_a_tuple_of_texts(stop: Any) -> None:
    with pytest.raises(RequestRefused, match="stop"):
        request([1], stop=stop)
