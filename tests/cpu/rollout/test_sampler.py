"""The sampler against plain reference distributions, computed token by token in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miles.rollout.native import sampler
from miles.rollout.native.keyed_random import streams, uniform
from miles.rollout.native.sampler import NO_TOKEN, NO_TOP_K, NO_TOP_P, SamplingRows, inverse_cdf, sample

CHI_SQUARE_999 = {2: 13.8, 4: 18.5, 7: 24.3, 11: 31.3, 19: 43.8}
"""99.9 % quantiles by degrees of freedom."""


def rows(
    num: int,
    *,
    seed: int = 1,
    temperature: float = 1.0,
    top_k: int = -1,
    top_p: float = 1.0,
    min_length: int = 0,
    stop_ids: tuple[int, ...] = (NO_TOKEN,),
) -> SamplingRows:
    """The same parameters for `num` rows with sample keys 0..num-1."""
    greedy = temperature == 0
    return SamplingRows(
        stream=streams(seed, torch.arange(num)),
        temperature=torch.full((num,), 1.0 if greedy else temperature),
        greedy=torch.full((num,), greedy),
        top_k=torch.full((num,), NO_TOP_K if top_k == -1 else top_k),
        top_p=torch.full((num,), NO_TOP_P if top_p == 1 else top_p, dtype=torch.float64),
        min_length=torch.full((num,), min_length),
        stop_ids=torch.tensor([stop_ids] * num),
        any_temperature=not greedy and temperature != 1,
        any_greedy=greedy,
        any_truncated=top_k != -1 or top_p != 1,
        any_min_length=min_length > 0,
    )


def reference_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Joint top-k and top-p on one row of logits, written out plainly."""
    weights = np.exp(logits.astype(np.float64) / temperature)
    probs = weights / weights.sum()
    kept, mass = np.zeros_like(probs), 0.0
    for rank, token in enumerate(np.argsort(-probs, kind="stable")):
        if (top_k == -1 or rank < top_k) and mass < top_p:
            kept[token] = probs[token]
        mass += probs[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, -1, 1.0), (0.6, -1, 1.0), (1.7, 5, 1.0), (1.0, -1, 0.8), (0.9, 8, 0.95), (1.0, 3, 0.99)],
)
def test_draws_follow_the_reference_distribution(temperature: float, top_k: int, top_p: float) -> None:
    num = 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    expected = reference_distribution(logits.numpy(), temperature, top_k, top_p)
    ids, _ = sample(
        logits.expand(num, -1),
        rows(num, temperature=temperature, top_k=top_k, top_p=top_p),
        torch.zeros(num, dtype=torch.int64),
    )
    counts = np.bincount(ids.numpy(), minlength=12)
    assert counts[expected == 0].sum() == 0
    support = expected > 0
    chi_square = float(((counts - num * expected)[support] ** 2 / (num * expected)[support]).sum())
    freedom = int(support.sum()) - 1
    assert chi_square < CHI_SQUARE_999[min(k for k in CHI_SQUARE_999 if k >= freedom)]


def test_log_probs_are_the_full_softmax_at_the_temperature_even_when_truncated() -> None:
    logits = torch.randn(5, 30)
    ids, log_probs = sample(logits, rows(5, temperature=0.7, top_k=4, top_p=0.9), torch.arange(5))
    expected = torch.log_softmax(logits / 0.7, dim=-1)[torch.arange(5), ids]
    torch.testing.assert_close(log_probs, expected)


def test_greedy_takes_the_maximum_and_reports_log_probs_at_temperature_one() -> None:
    logits = torch.randn(6, 40)
    ids, log_probs = sample(logits, rows(6, temperature=0.0), torch.zeros(6, dtype=torch.int64))
    assert torch.equal(ids, logits.argmax(dim=-1))
    assert torch.equal(log_probs, torch.log_softmax(logits, dim=-1).max(dim=-1).values)


def test_rows_of_a_mixed_batch_equal_the_rows_alone() -> None:
    """Greedy, hot, truncated and plain rows side by side do not influence each other."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings: list[dict[str, float]] = [{}, {"temperature": 0.0}, {"temperature": 1.5}, {"top_p": 0.5}]
    alone = [rows(4, **s) for s in settings]  # type: ignore[arg-type]
    mixed = SamplingRows(
        **{
            name: torch.stack([getattr(r, name)[i] for i, r in enumerate(alone)])
            for name in ("stream", "temperature", "greedy", "top_k", "top_p", "min_length", "stop_ids")
        },
        any_temperature=True,
        any_greedy=True,
        any_truncated=True,
        any_min_length=False,
    )
    for position in range(50):
        at = torch.full((4,), position)
        ids, log_probs = sample(logits, mixed, at)
        for i, r in enumerate(alone):
            own_ids, own_log_probs = sample(logits, r, at)
            assert ids[i] == own_ids[i] and log_probs[i] == own_log_probs[i]


def test_top_k_keeps_exactly_k_of_tied_tokens() -> None:
    kept = sampler.truncate(torch.full((1, 6), 1 / 6), torch.tensor([2]), torch.tensor([NO_TOP_P]))
    assert kept.count_nonzero() == 2


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    probs = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    at = [(0.4, [1]), (0.5, [1]), (0.51, [1, 2]), (0.75, [1, 2]), (0.76, [0, 1, 2]), (1e-9, [1])]
    for top_p, expected in at:
        kept = sampler.truncate(probs, torch.tensor([NO_TOP_K]), torch.tensor([top_p], dtype=torch.float64))
        assert kept[0].nonzero().squeeze(1).tolist() == expected


def test_stop_ids_are_not_drawn_below_the_minimum_length() -> None:
    logits = torch.zeros(200, 6)
    logits[:, [2, 4]] = 12.0
    settings = rows(200, min_length=5, stop_ids=(2, 4, NO_TOKEN))
    early, log_probs = sample(logits, settings, torch.full((200,), 4))
    assert not set(early.tolist()) & {2, 4} and 0 in early, "padding must not ban token 0"
    assert log_probs.max() < -11, "log-probs stay those of the whole vocabulary"
    late, _ = sample(logits, settings, torch.full((200,), 5))
    assert set(late.tolist()) == {2, 4}


def test_a_stop_id_that_is_certain_can_still_be_forbidden() -> None:
    logits = torch.full((1, 4), -300.0)
    logits[0, 3], logits[0, 1] = 300.0, -299.0
    for position in range(20):
        ids, _ = sample(logits, rows(1, min_length=99, stop_ids=(3,)), torch.tensor([position]))
        assert ids.item() in (0, 1, 2)


def test_inverse_cdf_never_returns_a_token_of_weight_zero() -> None:
    weights = torch.tensor([[0.0, 1e-30, 0.0, 3.0, 0.0]]).repeat(3, 1)
    ids = inverse_cdf(weights, torch.tensor([2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64))
    assert ids.tolist() == [3, 3, 3]
    on_the_step = inverse_cdf(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([0.5], dtype=torch.float64))
    assert on_the_step.item() == 2


def test_large_vocabularies_are_searched_like_small_ones() -> None:
    """Block search = plain float64 cumulative sum, for draws all over the unit interval."""
    num, vocab = 3000, 5 * sampler.CDF_BLOCK + 17
    weights = torch.rand(1, vocab, generator=torch.Generator().manual_seed(1)).pow(8)
    weights[:, 1000:2100] = 0
    u = uniform(streams(5, torch.arange(num)), torch.zeros(num, dtype=torch.int64))
    cdf = weights.double().cumsum(dim=-1)
    plain = torch.searchsorted(cdf[0], u * cdf[0, -1], right=True)
    assert torch.equal(inverse_cdf(weights.expand(num, -1), u), plain)


@pytest.mark.parametrize("vocab", [sampler.CDF_BLOCK, 1 << 17])
def test_rare_tokens_keep_their_probability(vocab: int) -> None:
    """A float32 running sum would lose a tail of tokens far below 6e-8 each; float64 sums keep its mass."""
    weights = torch.full((1, vocab), 2.0**-26)
    weights[0, 0] = 1.0
    tail_mass = float(weights[0, 1:].double().sum())
    u = torch.tensor([1 / (1 + tail_mass) + 1e-9, 1 - 1e-12], dtype=torch.float64)
    assert inverse_cdf(weights.expand(2, -1), u).tolist() == [1, vocab - 1]


def test_non_finite_logits_show_in_the_log_prob() -> None:
    logits = torch.tensor([[0.0, math.nan, 1.0]])
    ids, log_probs = sample(logits, rows(1), torch.tensor([0]))
    assert 0 <= ids.item() < 3 and torch.isnan(log_probs).all()
