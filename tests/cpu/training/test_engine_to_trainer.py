"""The real engine feeds the trainer: its tokens, log-probs and routes arrive row by row where they belong."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.arch import ArchSpec
from miles.data.batch import TrainBatch, pack
from miles.data.sample import Sample, SampleStatus
from miles.data.turns import Reading, continued, with_tool_output
from miles.models import mlp
from miles.rollout.engine import GenerateRequest, SamplingParams
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.shared_prompts import find_shared_prompts
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, TrainerSettings

TEMPERATURE = 0.9
SETTINGS = TrainerSettings(algorithm=AlgorithmSettings(temperature=TEMPERATURE), probe_tokens=10_000)
GROUPS, GROUP_SIZE = 6, 4


async def _roll_out(spec: ArchSpec, trainer: NativeTrainer, dtype: torch.dtype) -> TrainBatch:
    engine = NativeEngine(
        spec, EngineSettings(max_context_len=32, seed=3, max_running_requests=5, dtype=dtype)
    )
    await engine.receive_weights(trainer.named_weights(), version=1)
    sampling = SamplingParams(max_new_tokens=10, temperature=TEMPERATURE, stop_token_ids=(1,))
    samples = []
    for group in range(GROUPS):
        prompt = [3 + group, 7, 11 + group, 5][: 2 + group % 3]
        requests = [
            GenerateRequest(input_ids=prompt, sampling=sampling, sample_key=group * 100 + i, group=group)
            for i in range(GROUP_SIZE)
        ]
        for i, output in enumerate(await engine.generate(requests)):
            stopped = output.finish_reason == "stop"
            samples.append(
                Sample(
                    prompt="",
                    tokens=[*prompt, *output.output_ids],
                    response_length=len(output.output_ids),
                    status=SampleStatus.COMPLETED if stopped else SampleStatus.TRUNCATED,
                    reward=float(i),
                    rollout_log_probs=output.log_probs,
                    rollout_routed_experts=output.routed_experts,
                    group_index=group,
                    index=len(samples),
                    rollout_id=len(samples),
                )
            )
    return pack(samples)


@pytest.fixture
def rolled_out(spec, make_trainer):
    def make(dtype: torch.dtype = torch.float32) -> tuple[NativeTrainer, TrainBatch]:
        trainer = make_trainer(spec, SETTINGS)
        return trainer, asyncio.run(asyncio.wait_for(_roll_out(spec, trainer, dtype), 600))

    return make


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    calls: list[torch.Tensor] = []
    run = mlp.routed_experts

    def spy(x, ids, *rest):
        calls.append(ids.clone())
        return run(x, ids, *rest)

    monkeypatch.setattr(mlp, "routed_experts", spy)
    return calls


def test_an_fp32_engine_and_trainer_agree(rolled_out) -> None:
    trainer, batch = rolled_out()
    metrics = trainer.train_step(batch).metrics
    assert metrics["train/train_rollout_logprob_abs_diff_max"] < 2e-5
    assert metrics["route/flip_frac"] == 0 and metrics["route/replayed_rows_frac"] == 1


def test_a_bf16_engines_experts_run_in_the_fp32_trainer(rolled_out, dispatched) -> None:
    trainer, batch = rolled_out(torch.bfloat16)
    dispatched.clear()
    trainer.settings = replace(SETTINGS, probe_tokens=0)
    trainer.train_step(batch)
    assert len(dispatched) == 2
    shared = find_shared_prompts(batch, np.arange(batch.num_sequences))
    assert shared is not None, "the engine prefills a prompt once, so its routes are those of the whole group"
    routes = torch.stack(dispatched, 1).to(torch.int16).numpy()
    np.testing.assert_array_equal(routes[shared.row_of_packed], batch.routes)


@pytest.mark.parametrize("axis", [0, 1], ids=["row", "layer"])
def test_routes_shifted_by_one_row_or_layer_stand_out(axis, rolled_out) -> None:
    trainer, batch = rolled_out(torch.bfloat16)
    right = trainer.log_probs(batch).metrics
    wrong = trainer.log_probs(batch.with_rows(routes=np.roll(batch.routes, 1, axis=axis))).metrics
    assert right["route/flip_frac"] < 0.1 and right["route/zero_overlap_frac"] < 0.01
    assert wrong["route/flip_frac"] > 0.4 and wrong["route/zero_overlap_frac"] > 0.02


def dialogue_of(spec: ArchSpec, trainer: NativeTrainer) -> tuple[list[Sample], list[np.ndarray]]:
    """Responses of a bf16 engine in three turns with two words of a tool between them, and the routes of the
    last reading alone. Each turn's routers are off by about one percent, so that readings choose otherwise
    as they do where prefill and decode round differently.
    """
    noise = torch.Generator().manual_seed(5)

    def of_turn() -> list[tuple[str, torch.Tensor]]:
        return [
            (name, tensor * (1 + 0.01 * torch.randn(tensor.shape, generator=noise)))
            if name.endswith("mlp.gate.weight")
            else (name, tensor)
            for name, tensor in trainer.named_weights()
        ]

    async def speak() -> tuple[list[Sample], list[np.ndarray]]:
        engine = NativeEngine(spec, EngineSettings(max_context_len=64, seed=3, dtype=torch.bfloat16))
        sampling = SamplingParams(max_new_tokens=8, temperature=TEMPERATURE)
        samples = [Sample(prompt="", tokens=[3 + i % 20, 7, 11], group_index=i, index=i) for i in range(48)]
        last = [np.zeros(0)] * len(samples)
        for turn in range(3):
            await engine.receive_weights(of_turn(), version=1)
            asked = [
                GenerateRequest(input_ids=sample.tokens, sampling=sampling, sample_key=i)
                for i, sample in enumerate(samples)
            ]
            for i, output in enumerate(await engine.generate(asked)):
                reading = Reading(
                    token_ids=output.output_ids,
                    log_probs=output.log_probs,
                    routes=output.routed_experts,
                    weight_versions=output.weight_versions,
                )
                samples[i] = continued(samples[i], reading)
                samples[i].status, samples[i].reward = SampleStatus.TRUNCATED, float(i % 2)
                samples[i].rollout_id = i
                last[i] = output.routed_experts
                if turn < 2:
                    samples[i] = with_tool_output(samples[i], [20, 21])
        return samples, last

    return asyncio.run(asyncio.wait_for(speak(), 600))


def test_turns_of_a_bf16_engine_are_replayed_as_their_log_probs_were_made(
    spec, make_trainer, dispatched
) -> None:
    """A later reading of a row rounds differently and may choose other experts; those of the reading that
    sampled the row's target leave the smaller gap.
    """
    trainer = make_trainer(spec, replace(SETTINGS, probe_tokens=0))
    samples, last = dialogue_of(spec, trainer)
    batch = pack(samples)
    assert batch.routes is not None and batch.routes.min() >= 0, "every row was read in some turn"
    differs = np.concatenate(last) != batch.routes
    assert 0 < differs.mean() < 0.05, "readings disagree on a few routes"
    dispatched.clear()
    first = trainer.log_probs(batch).metrics
    np.testing.assert_array_equal(torch.stack(dispatched, 1).to(torch.int16).numpy(), batch.routes)
    replaced = trainer.log_probs(batch.with_rows(routes=np.concatenate(last))).metrics
    gap = "train/train_rollout_logprob_abs_diff"
    assert first["route/replayed_rows_frac"] == 1.0 and first["route/dispatched_flip_frac"] == 0.0
    assert first[f"{gap}_max"] < replaced[f"{gap}_max"] and first[gap] < replaced[gap]
