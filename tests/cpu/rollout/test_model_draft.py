"""The MTP layers as the engine's draft: they see what training showed them, and change no output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.arch import spec_from_hf_config, with_mtp
from miles.models.attention import PackedAttention
from miles.models.decoder import Taps
from miles.models.eagle import DraftModel
from miles.models.mtp import MtpDraft
from miles.models.routing import Router
from miles.rollout.native.beams import Beams
from miles.rollout.native.draft import SpeculationSettings
from miles.rollout.native.draft_tree import Proposal
from miles.rollout.native.engine import NativeEngine
from miles.rollout.native.sampler import SamplingRows
from tests.cpu.rollout.conftest import Policy, generate_all, make_decoder, now, prompt_groups, request
from tests.cpu.weights.test_draft_checkpoint import (
    EAGLE,
    EAGLE3,
    TARGET,
    eagle3_weights,
    eagle_weights,
    write,
)

CHAIN = SpeculationSettings(algorithm="NEXTN", num_steps=3, num_draft_tokens=4)
TREE = SpeculationSettings(algorithm="EAGLE", num_steps=3, eagle_topk=2, num_draft_tokens=7)


@pytest.fixture(scope="module")
def mtp(policy: Policy) -> MtpDraft:
    draft = MtpDraft(with_mtp(policy.spec, 1))
    draft.init_weights(torch.Generator().manual_seed(3))
    return draft.requires_grad_(False)


def engine_with(policy: Policy, mtp: MtpDraft, settings: SpeculationSettings, **more: Any) -> NativeEngine:
    with_draft = Policy(mtp.spec, policy.decoder)
    engine = with_draft.engine(speculation=settings, **more)
    now(engine.share_weights(policy.decoder, version=0, draft=mtp))
    return engine


class Spy:
    """Notes what a draft proposes, with the tokens that it proposes it for."""

    def __init__(self, engine: NativeEngine) -> None:
        speculation = engine._batch.speculation
        assert speculation is not None
        self.slots, self.seen = engine._batch.slots, []
        self._propose = speculation.draft.propose
        speculation.draft.propose = self.propose  # type: ignore[method-assign]

    def propose(self, running: int, rows: SamplingRows, num_steps: int) -> Proposal:
        proposal = self._propose(running, rows, num_steps)
        for row, length in enumerate(self.slots.lengths[:running].tolist()):
            self.seen.append((self.slots.tokens[row, :length].tolist(), proposal, row))
        return proposal


def expected_chain(policy: Policy, mtp: DraftModel, known: list[int], guesses: list[int]) -> torch.Tensor:
    """What the draft should expect behind `known` and each guess but the last: one packed pass per depth."""
    cu, positions = torch.tensor([0, len(known) - 1]), torch.arange(len(known) - 1)
    taps = Taps(mtp.taps)
    hidden = policy.decoder(torch.tensor(known[:-1]), positions, PackedAttention(cu), Router.decide(), taps)
    hidden = taps.joined() if mtp.taps else hidden
    sequence, expected = list(known), []
    for step in range(len(guesses)):
        cu, positions = torch.tensor([0, len(sequence) - 1]), torch.arange(len(sequence) - 1)
        following = torch.tensor(sequence[1:])
        features = mtp(hidden, following, positions, PackedAttention(cu), policy.decoder)
        expected.append(torch.softmax(mtp.logits(features[-1:], policy.decoder), -1)[0])
        if step + 1 < len(guesses):
            hidden = torch.cat((hidden, features[-1:]))
        sequence.append(guesses[step])
    return torch.stack(expected)


def test_the_draft_reads_what_it_was_trained_to_read(policy: Policy, mtp: MtpDraft) -> None:
    """Prompts shared by a group, slots that move, runs of one to four tokens: every proposal is that of a
    packed pass over the request's own tokens."""
    engine = engine_with(policy, mtp, CHAIN, max_running_requests=5)
    spy = Spy(engine)
    generate_all(engine, prompt_groups(3, 4, max_new_tokens=9, stop_token_ids=(3, 8, 21)))
    assert len(spy.seen) > 40
    for known, proposal, row in spy.seen:
        assert proposal.probs is not None
        guesses = proposal.tokens[row].tolist()
        expected = expected_chain(policy, mtp, known, guesses)
        torch.testing.assert_close(proposal.probs[row], expected, atol=1e-5, rtol=0)


def test_a_tree_holds_the_likeliest_guesses(policy: Policy, mtp: MtpDraft) -> None:
    engine = engine_with(policy, mtp, TREE)
    spy = Spy(engine)
    generate_all(engine, prompt_groups(2, 3, max_new_tokens=9))
    deep = 0
    for known, proposal, row in spy.seen:
        paths = {0: list[int]()}
        for number in range(proposal.tokens.shape[1]):
            parent = int(proposal.parents[row, number])
            paths[number + 1] = [*paths[parent], int(proposal.tokens[row, number])]
            assert len(paths[number + 1]) == int(proposal.depths[row, number])
        assert len({tuple(path) for path in paths.values()}) == len(paths), "no guess twice"
        best = expected_chain(policy, mtp, known, [0])[0].topk(2).indices.tolist()
        assert sorted(path[0] for path in paths.values() if len(path) == 1) == sorted(best)
        for path in paths.values():
            if len(path) >= 2:
                after = expected_chain(policy, mtp, known, path)[len(path) - 1]
                assert path[-1] in after.topk(2).indices.tolist()
                deep += 1
    assert deep > 20


def test_beams_keep_the_best_products() -> None:
    """Level 1: 0.6 and 0.3; behind them 0.9 and 0.1, and 0.5 and 0.5."""
    start = torch.tensor([[0.6, 0.3, 0.1]])
    beams = Beams.start(start, 2)
    parents = beams.grow(torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.0, 0.5]]))
    assert parents.tolist() == [0, 1], "0.54 goes on from 0.6 and 0.15 from 0.3"
    proposal = beams.best(4)
    assert proposal.tokens.tolist() == [[0, 1, 1, 0]]
    assert proposal.parents.tolist() == [[0, 0, 1, 2]]
    assert proposal.depths.tolist() == [[1, 1, 2, 2]]


@pytest.mark.parametrize("settings", [CHAIN, TREE], ids=["chain", "tree"])
def test_greedy_answers_are_those_of_plain_decoding(
    policy: Policy, mtp: MtpDraft, settings: SpeculationSettings
) -> None:
    calls = prompt_groups(3, 3, max_new_tokens=14, stop_token_ids=(3, 8, 21), temperature=0.0)
    plain = generate_all(policy.engine(), calls)
    guessed = generate_all(engine_with(policy, mtp, settings), calls)
    for one, other in zip(plain, guessed, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.output_ids == b.output_ids
            np.testing.assert_array_equal(a.routed_experts, b.routed_experts)
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5, rtol=0)


def test_a_tree_draws_the_tokens_of_plain_decoding(policy: Policy, mtp: MtpDraft) -> None:
    calls = prompt_groups(3, 3, max_new_tokens=14, temperature=0.7, top_p=0.9)
    plain = generate_all(policy.engine(), calls)
    guessed = generate_all(engine_with(policy, mtp, TREE), calls)
    for one, other in zip(plain, guessed, strict=True):
        assert [a.output_ids for a in one] == [b.output_ids for b in other]


@pytest.mark.parametrize("limit", [{"max_running_requests": 3}, {"max_prefill_tokens": 4}], ids=str)
def test_a_chain_does_not_depend_on_the_batch(policy: Policy, mtp: MtpDraft, limit: dict[str, int]) -> None:
    calls = prompt_groups(4, 3, max_new_tokens=12, stop_token_ids=(3, 8, 21))
    together = generate_all(engine_with(policy, mtp, CHAIN), calls)
    narrow = generate_all(engine_with(policy, mtp, CHAIN, **limit), calls)
    for one, other in zip(together, narrow, strict=True):
        assert [a.output_ids for a in one] == [b.output_ids for b in other]
        assert [a.spec_info for a in one] == [b.spec_info for b in other]


def test_fewer_steps_asked_are_fewer_steps_guessed(policy: Policy, mtp: MtpDraft) -> None:
    (call,) = prompt_groups(1, 3, max_new_tokens=14)
    engine = engine_with(policy, mtp, CHAIN)
    (outputs,) = generate_all(engine, [[replace(r, speculative_num_steps=1) for r in call]])
    for output in outputs:
        info = output.spec_info
        assert info is not None and len(info.tried) == 1
        assert info.draft_tokens <= info.verify_steps


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_draft_of_its_own_checkpoint_guesses(kind: str, tmp_path: Path) -> None:
    """EAGLE reads final hidden states, EAGLE-3 three layers; neither changes what is said."""
    config, weights = {"eagle": (EAGLE, eagle_weights), "eagle3": (EAGLE3, eagle3_weights)}[kind]
    path = write(tmp_path / kind, config, weights())
    spec = spec_from_hf_config(TARGET)
    policy = Policy(spec, make_decoder(spec))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, spec.vocab_size, 5).tolist() for _ in range(3)]
    for settings in (CHAIN, TREE):
        settings = replace(settings, algorithm=kind.upper(), draft_model_path=str(path))  # type: ignore[arg-type]
        for temperature in (0.0, 1.0):
            calls = [
                [request(p, 3 * g + i, g, max_new_tokens=10, temperature=temperature) for i in range(3)]
                for g, p in enumerate(prompts)
            ]
            engine = policy.engine(speculation=settings)
            spy = Spy(engine)
            outputs = generate_all(engine, calls)
            if temperature == 0 or settings.eagle_topk > 1:
                plain = generate_all(policy.engine(), calls)
                for one, other in zip(plain, outputs, strict=True):
                    assert [a.output_ids for a in one] == [b.output_ids for b in other]
            draft = engine._runner.draft
            assert draft is not None
            for known, proposal, row in spy.seen if temperature == 1 and settings.eagle_topk == 1 else ():
                assert proposal.probs is not None
                expected = expected_chain(policy, draft, known, [0])
                torch.testing.assert_close(proposal.probs[row, :1], expected, atol=1e-5, rtol=0)
