"""The mixture-of-experts families against transformers: same weights, same logits, gradients and routes, and
the same text when decoded with a cache.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from family_cases import (
    CASES,
    FamilyCase,
    load_decoder,
    packed_logits,
    published_gradients,
    save_reference,
    sequences,
)
from torch import Tensor, nn

from miles.models.decoder import Decoder
from miles.models.routing import Router
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.weights.native_map import published_views, to_published


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> FamilyCase:
    return request.param


@pytest.fixture
def reference(case: FamilyCase, tmp_path: Path) -> nn.Module:
    return save_reference(case, tmp_path)


@pytest.fixture
def decoder(reference: nn.Module, tmp_path: Path) -> Decoder:
    return load_decoder(tmp_path)


def generate(decoder: Decoder, prompts: list[list[int]], **sampling: object) -> list[GenerateOutput]:
    """What an engine with a cache makes of prompts, read in chunks of 8 tokens."""
    requests = [
        GenerateRequest(
            input_ids=prompt, sampling=SamplingParams(max_new_tokens=12, **sampling), sample_key=i
        )
        for i, prompt in enumerate(prompts)
    ]

    async def run() -> list[GenerateOutput]:
        engine = NativeEngine(decoder.spec, EngineSettings(max_context_len=64, seed=5, max_prefill_tokens=8))
        await engine.receive_weights(to_published(decoder), version=0)
        return await engine.generate(requests)

    return asyncio.run(asyncio.wait_for(run(), timeout=600))


def test_logits_and_gradients_are_those_of_transformers(reference: nn.Module, decoder: Decoder) -> None:
    tokens = sequences(decoder.spec.vocab_size)
    expected = torch.cat([reference(sequence[None]).logits[0] for sequence in tokens])
    logits = packed_logits(decoder, tokens)
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() <= 1e-4

    weighting = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weighting).sum().backward()
    (logits * weighting).sum().backward()
    wanted = published_gradients(reference)
    frozen = [name for name, parameter in decoder.named_parameters() if not parameter.requires_grad]
    assert frozen and all(name.endswith("correction_bias") or ".indexer." in name for name in frozen)
    assert all(decoder.get_parameter(name).grad is None for name in frozen)
    native = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in decoder.named_parameters()
    }
    for name, grad in published_views(decoder.spec, native):
        if name.endswith("e_score_correction_bias") or ".indexer." in name:
            assert wanted.get(name) is None, "frozen in transformers as well"
        else:
            assert (grad - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


def test_greedy_continuations_are_those_of_transformers(reference: nn.Module, decoder: Decoder) -> None:
    prompts = [sequence.tolist() for sequence in sequences(decoder.spec.vocab_size, (11, 3, 20))]
    for prompt, output in zip(prompts, generate(decoder, prompts, temperature=0.0), strict=True):
        expected = reference.generate(  # type: ignore[operator]
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, min_new_tokens=12, eos_token_id=None
        )
        assert output.output_ids == expected[0, len(prompt) :].tolist()


def test_sampling_with_a_cache_gives_the_log_probs_and_routes_of_a_full_forward(decoder: Decoder) -> None:
    prompts = [sequence.tolist() for sequence in sequences(decoder.spec.vocab_size, (11, 3, 20))]
    for prompt, output in zip(prompts, generate(decoder, prompts), strict=True):
        text = torch.tensor(prompt + output.output_ids)
        router = Router.record()
        with torch.no_grad():
            logits = packed_logits(decoder, [text[:-1]], router)
        log_probs = logits.log_softmax(-1).gather(1, text[1:, None])[len(prompt) - 1 :, 0]
        assert (log_probs - torch.from_numpy(output.log_probs)).abs().max() <= 1e-4
        assert output.routed_experts is not None
        assert sorted_ids(torch.from_numpy(output.routed_experts)).equal(sorted_ids(router.recorded()))


def sorted_ids(routes: Tensor) -> Tensor:
    return routes.long().sort(-1).values


def test_recorded_routes_are_those_of_transformers_and_replay_steers(
    reference: nn.Module, decoder: Decoder
) -> None:
    tokens = sequences(decoder.spec.vocab_size, (25,))
    chosen: list[Tensor] = []
    for module in reference.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    recorded, moe = Router.record(), decoder.spec.moe
    assert moe is not None
    with torch.no_grad():
        reference(tokens[0][None])
        logits = packed_logits(decoder, tokens, recorded)
        routes = recorded.recorded()
        assert sorted_ids(routes).equal(sorted_ids(torch.stack(chosen, 1)))
        assert torch.equal(packed_logits(decoder, tokens, Router.replay(routes)), logits)
        others = (routes + 1) % moe.num_experts
        steered = Router.replay(others)
        assert (packed_logits(decoder, tokens, steered) - logits).abs().max() > 1e-2
        assert steered.recorded().equal(others)


@pytest.mark.slow
def test_layers_that_run_again_in_backward_have_the_same_gradients(decoder: Decoder) -> None:
    tokens, gradients = sequences(decoder.spec.vocab_size, (19, 6)), []
    for again in (False, True):
        if again:
            decoder.recompute_num_layers = decoder.spec.num_layers
            decoder.recompute(frozenset({"core_attn", "mlp"}))
        decoder.zero_grad()
        packed_logits(decoder, tokens).square().sum().backward()
        gradients.append([parameter.grad for parameter in decoder.parameters() if parameter.requires_grad])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-4)
