"""Speculative sampling draws from the policy: a chi-square test over whole continuations, which a verifier
that lets 2 % more of the guesses stand fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from miles.rollout.engine import GenerateRequest
from miles.rollout.native import verify
from miles.rollout.native.draft import SpeculationSettings
from tests.cpu.rollout.conftest import Policy, generate_all, make_decoder, make_spec, request
from tests.cpu.rollout.drafts import DrawingDraft, use_draft

VOCABULARY = 5
PROMPT = (1, 4, 2, 3)
NUM_SAMPLES = 40_960
NEW_TOKENS = 3
SIGNIFICANCE = 0.01
SEEDS = (1, 2, 3)
"""Of the engine. The test is deterministic: it rejects or it does not."""

CHAIN = SpeculationSettings(algorithm="NGRAM", num_steps=2, num_draft_tokens=3)
SAMPLING: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": 2.0}


@pytest.fixture(scope="module")
def policy() -> Policy:
    """With so few tokens that every continuation of three is a cell of its own."""
    spec = replace(make_spec(), vocab_size=VOCABULARY)
    return Policy(spec, make_decoder(spec))


def requests(seed: int) -> list[GenerateRequest]:
    return [request(PROMPT, key=seed * NUM_SAMPLES + i, group=0, **SAMPLING) for i in range(NUM_SAMPLES)]


def continuation_probabilities(policy: Policy) -> dict[tuple[int, ...], float]:
    """Of every continuation that plain sampling can draw, by the packed forward."""
    paths = list(product(range(VOCABULARY), repeat=NEW_TOKENS))
    log_probs, _ = policy.packed([[*PROMPT, *path] for path in paths], temperature=2.0)
    start = len(PROMPT) - 1
    return {
        path: float(sum(rows[start + i, token].double() for i, token in enumerate(path)).exp())
        for path, rows in zip(paths, log_probs, strict=True)
    }


def p_value(drawn: Sequence[Sequence[int]], expected: dict[tuple[int, ...], float]) -> float:
    """Of Pearson's chi-square statistic of the continuations against their probabilities."""
    cells = {path: index for index, path in enumerate(expected)}
    counts = torch.bincount(torch.tensor([cells[tuple(ids)] for ids in drawn]), minlength=len(cells))
    wanted = torch.tensor(list(expected.values()), dtype=torch.float64) * len(drawn)
    assert float(wanted.min()) > 5, "the approximation needs some of every cell"
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def draw(policy: Policy, seed: int, settings: SpeculationSettings | None) -> list[list[int]]:
    """Continuations, plain ones or behind a draft that is sure of itself and often wrong."""
    engine = policy.engine(seed=seed, max_running_requests=1024, max_context_len=16, speculation=settings)
    if settings is not None:
        use_draft(engine, DrawingDraft(engine, sure=12.0))
    (outputs,) = generate_all(engine, [requests(seed)])
    if settings is not None:
        infos = [out.spec_info for out in outputs if out.spec_info]
        assert 0.1 < sum(i.accepted_tokens for i in infos) / sum(i.draft_tokens for i in infos) < 0.9
    return [out.output_ids for out in outputs]


@pytest.fixture(scope="module")
def expected(policy: Policy) -> dict[tuple[int, ...], float]:
    return continuation_probabilities(policy)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_continuations_are_distributed_as_plain_ones(
    policy: Policy, expected: dict[tuple[int, ...], float], seed: int
) -> None:
    assert p_value(draw(policy, seed, None), expected) > SIGNIFICANCE
    assert p_value(draw(policy, seed, CHAIN), expected) > SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_test_rejects_a_verifier_that_favours_the_draft(
    policy: Policy, expected: dict[tuple[int, ...], float], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each guess stands with a probability that is 0.02 too high."""
    honest = verify.uniform

    def biased(stream: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        numbers = honest(stream, position)
        return numbers - 0.02 if numbers.dim() == 2 else numbers  # the coins are a grid, draws are not

    monkeypatch.setattr(verify, "uniform", biased)
    assert p_value(draw(policy, seed, CHAIN), expected) < SIGNIFICANCE
