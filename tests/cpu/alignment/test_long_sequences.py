"""Training steps on 32 sequences of more than 1,024 tokens: the gap is exactly 0 on every token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alignment_support import QUICKSTART, SPECS, Sides, Traffic

pytestmark = pytest.mark.slow

PROMPTS = (1024, 1031, 1087, 1153, 1025, 1100, 1216, 1040)
GROUPS = Traffic(
    PROMPTS, (17, 9, 24, 5, 12, 20, 3, 16), group=4, slots=32, max_prefill_tokens=1 << 14, micro_batch=5
)
ALL_DIFFERENT = replace(GROUPS, prompts=PROMPTS * 4, responses=GROUPS.responses * 4, group=1)
CASES = {
    "prompts shared by groups of four": GROUPS,
    "prompts all different, in another order": replace(ALL_DIFFERENT, order_seed=3),
    "prompts read in chunks": replace(ALL_DIFFERENT, max_prefill_tokens=200),
    "one request at a time": replace(GROUPS, slots=1),
    "256 slots": replace(GROUPS, slots=256),
    "long responses": replace(GROUPS, prompts=(40,) * 8, responses=(990,) * 8),
}


def train(sides: Sides, traffic: Traffic) -> None:
    """Steps with an assertion each: three with groups, whose weights change in between, one without."""
    sides.trainer.settings = replace(sides.settings, micro_batch_size=traffic.micro_batch)
    for step in range(3 if traffic.group > 1 else 1):
        batch = sides.roll_out(replace(traffic, order_seed=traffic.order_seed + step))
        assert batch.num_sequences == 32 and batch.lengths.min() >= 1024
        result = sides.trainer.train_step(batch)
        assert result.metrics["train/train_rollout_logprob_abs_diff_max"] == 0.0, step
        assert traffic.group == 1 or result.optimizer_steps[0]["train/grad_norm"] > 0


@pytest.mark.parametrize("case", CASES)
def test_steps_of_an_moe(case: str, exact) -> None:
    train(Sides(QUICKSTART, exact(QUICKSTART, torch.float32)), CASES[case])


def test_steps_in_bf16(exact) -> None:
    train(Sides(QUICKSTART, exact(QUICKSTART, torch.bfloat16), torch.bfloat16), GROUPS)


def test_steps_in_bf16_read_in_chunks(exact) -> None:
    sides = Sides(QUICKSTART, exact(QUICKSTART, torch.bfloat16), torch.bfloat16)
    train(sides, replace(ALL_DIFFERENT, max_prefill_tokens=333))


def test_steps_of_a_dense_model(exact) -> None:
    train(Sides(SPECS["dense"], exact(SPECS["dense"], torch.float32)), GROUPS)
