"""MTP layers of the families that have them, as the engine's draft: greedy answers do not change."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from family_cases import SHIPPING_MTP, FamilyCase, load_decoder, save_reference, sequences

from miles.arch import load_spec, with_mtp
from miles.models.mtp import MtpDraft
from miles.rollout.engine import GenerateOutput, GenerateRequest, SamplingParams
from miles.rollout.native.draft import SpeculationSettings
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.weights.native_map import to_published

CHAIN = SpeculationSettings(algorithm="NEXTN", num_steps=2, num_draft_tokens=3)
TREE = SpeculationSettings(algorithm="EAGLE", num_steps=2, eagle_topk=2, num_draft_tokens=5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("case", SHIPPING_MTP.values(), ids=SHIPPING_MTP.keys())
def test_greedy_answers_are_those_of_plain_decoding(
    case: FamilyCase, settings: SpeculationSettings, tmp_path: Path
) -> None:
    save_reference(case, tmp_path)
    decoder = load_decoder(tmp_path)
    draft = MtpDraft(with_mtp(load_spec(tmp_path), 1))
    draft.init_weights(torch.Generator().manual_seed(1))
    prompts = [sequence.tolist() for sequence in sequences(decoder.spec.vocab_size, (11, 3, 20))]
    sampling = SamplingParams(max_new_tokens=14, temperature=0.0)
    requests = [GenerateRequest(input_ids=p, sampling=sampling, sample_key=i) for i, p in enumerate(prompts)]

    async def answers(speculation: SpeculationSettings | None) -> list[GenerateOutput]:
        spec = decoder.spec if speculation is None else draft.spec
        engine = NativeEngine(spec, EngineSettings(max_context_len=64, seed=5, speculation=speculation))
        weights = to_published(decoder, None if speculation is None else draft)
        await engine.receive_weights(weights, version=0)
        return await engine.generate(requests)

    plain, guessed = asyncio.run(answers(None)), asyncio.run(answers(settings))
    assert [one.output_ids for one in plain] == [other.output_ids for other in guessed]
    assert all(other.spec_info is not None and other.spec_info.verify_steps for other in guessed)
