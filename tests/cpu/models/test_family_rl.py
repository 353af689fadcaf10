"""Every family learns: responses of its own engine, rewarded by what they say, trained on with GRPO."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from family_cases import ONE_OF_EACH, save_reference

from miles.arch import load_spec
from miles.data.batch import TrainBatch, pack
from miles.data.sample import Sample, SampleStatus
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings
from miles.weights.hf import read_hf
from tests.cpu.families.tiny_checkpoints import CASES as OTHER_CASES

Save = Callable[[Path], object]
SAVES: dict[str, Save] = {name: partial(save_reference, case) for name, case in ONE_OF_EACH.items()}
SAVES |= {name: case.save for name, case in OTHER_CASES.items()}
"""What writes a tiny checkpoint of every family."""

GROUPS, GROUP_SIZE, RESPONSE = 4, 8, 12


def reward(response: list[int]) -> float:
    """The share of tokens whose id is even: what a policy that writes even ids alone gets is 1."""
    return sum(token % 2 == 0 for token in response) / len(response)


async def roll_out(engine: NativeEngine, trainer: NativeTrainer, version: int) -> TrainBatch:
    await engine.receive_weights(trainer.named_weights(), version=version)
    samples = []
    for group in range(GROUPS):
        prompt = [3 + group, 7, 11 + group, 5][: 2 + group % 3]
        requests = [
            GenerateRequest(
                input_ids=prompt,
                sampling=SamplingParams(max_new_tokens=RESPONSE),
                sample_key=(version * GROUPS + group) * GROUP_SIZE + i,
                group=group,
            )
            for i in range(GROUP_SIZE)
        ]
        for output in await engine.generate(requests):
            samples.append(
                Sample(
                    prompt="",
                    tokens=[*prompt, *output.output_ids],
                    response_length=len(output.output_ids),
                    status=SampleStatus.TRUNCATED,
                    reward=reward(output.output_ids),
                    rollout_log_probs=output.log_probs,
                    rollout_routed_experts=output.routed_experts,
                    group_index=group,
                    index=len(samples),
                    rollout_id=len(samples),
                )
            )
    return pack(samples)


@pytest.mark.slow
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_grpo_raises_the_reward_and_leaves_router_biases_and_indexers_alone(
    save: Save, tmp_path: Path
) -> None:
    save(tmp_path)
    spec = load_spec(tmp_path)
    settings = TrainerSettings(
        algorithm=AlgorithmSettings(advantage_estimator="grpo", max_response_len=RESPONSE),
        optimizer=OptimizerSettings(lr=1e-2, weight_decay=0.1),
        moe_aux_loss_coeff=0.01 if spec.is_moe else 0.0,
    )
    trainer = NativeTrainer(spec, settings)
    trainer.load_weights(read_hf(tmp_path))
    before = {name: tensor.clone() for name, tensor in trainer.named_weights()}

    async def train() -> list[float]:
        engine = NativeEngine(spec, EngineSettings(max_context_len=32, seed=3))
        rewards = []
        for version in range(8):
            batch = await roll_out(engine, trainer, version)
            rewards.append(float(batch.rewards.mean()))
            log_probs, trained = trainer.log_probs(batch), batch.loss_mask > 0
            assert np.abs(log_probs.log_probs - batch.rollout_log_probs)[trained].max() <= 1e-4
            metrics = trainer.train_step(batch).metrics
            assert metrics["route/dispatched_flip_frac"] == 0 if spec.is_moe else spec.num_experts == 0
        return rewards

    rewards = asyncio.run(train())
    assert np.mean(rewards[-2:]) > rewards[0] + 0.1, rewards
    for name, tensor in trainer.named_weights():
        frozen = name.endswith("e_score_correction_bias") or ".indexer." in name
        assert torch.equal(tensor, before[name]) == frozen, name
