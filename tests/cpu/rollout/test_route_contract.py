"""What every engine owes about routes, checked on the native engine in all of its ways to make a token."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from miles.arch.spec import ArchSpec
from miles.rollout.engine import GenerateOutput, GenerateRequest
from miles.rollout.native.draft import SpeculationSettings
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.weights.native_map import to_published
from tests.cpu.rollout.conftest import Policy, generate_all, prompt_groups, request, run

WAYS: dict[str, dict[str, Any]] = {
    "one token per step": {},
    "few slots, so that requests move": {"max_running_requests": 3},
    "prompts in chunks": {"max_prefill_tokens": 3},
    "drawn chains": {"speculation": SpeculationSettings(algorithm="NGRAM", num_steps=3, num_draft_tokens=4)},
    "drawn trees": {
        "speculation": SpeculationSettings(algorithm="NGRAM", num_steps=4, eagle_topk=3, num_draft_tokens=9)
    },
    "bf16": {"dtype": torch.bfloat16},
}


def check_routes(asked: GenerateRequest, output: GenerateOutput, spec: ArchSpec) -> None:
    """Shape, type, and rows that are recorded whole or not at all."""
    routes, moe = output.routed_experts, spec.moe
    assert routes is not None and moe is not None
    assert routes.dtype == np.int16
    rows = len(asked.input_ids) + len(output.output_ids) - 1
    assert routes.shape == (rows, len(spec.moe_layers), moe.top_k)
    recorded = routes.min(axis=(1, 2)) >= 0
    assert (routes[~recorded] == -1).all(), "a row is recorded in every layer and slot, or in none"
    ordered = np.sort(routes[recorded], axis=-1)
    assert (np.diff(ordered, axis=-1) > 0).all(), "a token visits an expert once"
    assert ordered.max(initial=0) < moe.num_experts


def served(policy: Policy, **settings: Any) -> NativeEngine:
    if "dtype" not in settings:
        return policy.engine(**settings)
    engine = NativeEngine(policy.spec, EngineSettings(max_context_len=64, seed=11, **settings))
    run(engine.receive_weights(to_published(policy.decoder), version=0))
    return engine


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_every_row_but_the_last_is_recorded(policy: Policy, settings: dict[str, Any]) -> None:
    calls = prompt_groups(4, 4, max_new_tokens=16, stop_token_ids=(3, 8))
    engine = served(policy, **settings)
    for _ in range(2):  # The second time a draft has seen the answers.
        for asked, outputs in zip(calls, generate_all(engine, calls), strict=True):
            for one, output in zip(asked, outputs, strict=True):
                check_routes(one, output, policy.spec)
                assert output.routed_experts is not None and output.routed_experts.min() >= 0


def test_a_response_that_was_cut_off_has_the_routes_of_what_it_read(policy: Policy) -> None:
    async def interrupted() -> list[GenerateOutput]:
        engine = policy.engine(max_running_requests=1)
        call = asyncio.create_task(engine.generate([asked, waiting]))
        for _ in range(5):
            await asyncio.sleep(0)
        await engine.abort()
        return await call

    asked, waiting = (request([4, 9, 2], key=key, max_new_tokens=40) for key in (1, 2))
    begun, unbegun = run(interrupted())
    assert begun.finish_reason == unbegun.finish_reason == "abort"
    check_routes(asked, begun, policy.spec)
    assert unbegun.routed_experts is None, "nothing was read"


def test_the_check_sees_rows_that_are_recorded_in_part(policy: Policy) -> None:
    asked = request([4, 9, 2], key=1)
    ((output,),) = generate_all(policy.engine(), [[asked]])
    assert output.routed_experts is not None
    output.routed_experts[2] = -1
    check_routes(asked, output, policy.spec)
    output.routed_experts[2, 0, 0] = 1
    with pytest.raises(AssertionError, match="in every layer"):
        check_routes(asked, output, policy.spec)
