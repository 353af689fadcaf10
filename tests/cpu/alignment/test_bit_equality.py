"""Exact numerics: what the engine says a token's log-prob is, the trainer computes again, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alignment_support import QUICKSTART, SPECS, Sides, Traffic, needs_blocks, without_blocks

from miles.models.numerics import FAST

DTYPES = (torch.float32, torch.bfloat16)
LONG_IN_BF16 = (torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow))
MIXED = Traffic()
LIMITED = ("deepseek_v32", "gemma2", "gemma3", "gemma3n", "llama4")
CASES = {
    "one request at a time": replace(MIXED, slots=1),
    "all requests at once": replace(MIXED, slots=64),
    "another arrival order": replace(MIXED, order_seed=4, slots=3),
    "prompts read a few at a time": replace(MIXED, max_prefill_tokens=32),
    "prompts read in chunks": replace(MIXED, max_prefill_tokens=8),
    "chunks across key blocks": replace(
        MIXED, prompts=(300, 5), responses=(20, 90), group=3, max_prefill_tokens=77
    ),
    "groups of eight share a prompt": replace(MIXED, group=8, slots=64),
    "a group split over the slots": replace(MIXED, group=5, slots=3),
    "one sequence per micro-batch": replace(MIXED, micro_batch=1),
    "everything in one micro-batch": replace(MIXED, group=4, micro_batch=1000),
}


@pytest.mark.parametrize("dtype", LONG_IN_BF16, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_no_log_prob_differs(name: str, dtype: torch.dtype, exact) -> None:
    sides = Sides(SPECS[name], exact(SPECS[name], dtype), dtype)
    wrong, compared = sides.differing(replace(MIXED, group=3, slots=7))
    assert compared > 200 and wrong == 0


@pytest.mark.parametrize("case", CASES)
def test_neither_batch_nor_order_nor_sharing_shows_in_the_bits(case: str, exact) -> None:
    wrong, compared = Sides(QUICKSTART, exact(QUICKSTART, torch.float32)).differing(CASES[case])
    assert compared > 100 and wrong == 0


@pytest.mark.parametrize("dtype", LONG_IN_BF16, ids=str)
@pytest.mark.parametrize("name", LIMITED)
def test_tokens_that_do_not_see_all_before_them(name: str, dtype: torch.dtype, exact) -> None:
    """Across the borders of what they see, in whole sequences, in chunks and over key blocks left out."""
    sides = Sides(SPECS[name], exact(SPECS[name], dtype), dtype)
    for case in ("prompts read in chunks", "chunks across key blocks", "groups of eight share a prompt"):
        wrong, compared = sides.differing(CASES[case])
        assert compared > 100 and wrong == 0, case


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_traffic(dtype: torch.dtype, exact) -> None:
    sides = Sides(QUICKSTART, exact(QUICKSTART, dtype), dtype)
    generator = torch.Generator().manual_seed(1)

    def draw(high: int, count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, high, (count,), generator=generator).tolist())

    for seed in range(4):
        slots, micro_batch = draw(20, 2)
        traffic = Traffic(draw(50, 12), draw(60, 12), 2, slots, 40, seed, micro_batch)
        wrong, compared = sides.differing(traffic)
        assert compared > 300 and wrong == 0, traffic


@pytest.mark.parametrize("dtype", LONG_IN_BF16, ids=str)
def test_sequences_across_many_key_blocks(dtype: torch.dtype, exact) -> None:
    """Lengths beside the block boundaries, and one prompt of several thousand tokens."""
    sides = Sides(QUICKSTART, exact(QUICKSTART, dtype), dtype)
    for traffic in (
        Traffic((100, 127, 128, 129, 250, 5), (30, 3, 2, 130, 10, 140), slots=4, micro_batch=2),
        Traffic((3000, 40), (12, 20), slots=2, micro_batch=2),
    ):
        wrong, compared = sides.differing(traffic)
        assert compared >= 32 and wrong == 0, traffic


def test_the_mode_without_replay_is_as_exact(exact) -> None:
    """The trainer's own decisions are the engine's: there is nothing for replay to mend."""
    sides = Sides(QUICKSTART, exact(QUICKSTART, torch.float32))
    sides.settings = replace(sides.settings, replay_routes=False)
    wrong, compared = sides.differing(MIXED)
    assert compared > 100 and wrong == 0


def test_fast_numerics_differ(exact) -> None:
    """The comparison can fail: with fast kernels on both sides, or on one, most tokens differ."""
    for engine, trainer in ((FAST, FAST), (exact(QUICKSTART, torch.float32), FAST)):
        wrong, compared = Sides(QUICKSTART, engine, trainer_numerics=trainer).differing(MIXED)
        assert wrong > compared / 2


def test_without_row_blocks_the_bits_depend_on_the_batch(exact) -> None:
    found = exact(QUICKSTART, torch.float32)
    if not needs_blocks(found):
        pytest.skip("on this machine a row's bits do not depend on the number of rows")
    wrong, _ = Sides(QUICKSTART, without_blocks(found)).differing(replace(MIXED, slots=1))
    assert wrong > 0


def test_a_step_reports_a_gap_of_exactly_zero_and_ratios_of_exactly_one(exact) -> None:
    sides = Sides(QUICKSTART, exact(QUICKSTART, torch.float32))
    sides.settings = replace(sides.settings, micro_batch_size=5)
    for num_steps in (1, 2):
        sides.trainer.settings = replace(sides.settings, num_steps_per_rollout=num_steps)
        batch = sides.roll_out(replace(MIXED, group=4, slots=5))
        result = sides.trainer.train_step(batch)
        assert result.metrics["train/train_rollout_logprob_abs_diff"] == 0.0
        assert result.metrics["train/train_rollout_logprob_abs_diff_max"] == 0.0
        assert result.metrics["train/train_rollout_kl"] == 0.0
        assert result.optimizer_steps[0]["train/ppo_kl"] == 0.0
        assert result.optimizer_steps[0]["train/pg_clipfrac"] == 0.0
        assert result.metrics["route/flip_frac"] == 0.0
        assert result.optimizer_steps[0]["train/grad_norm"] > 0
