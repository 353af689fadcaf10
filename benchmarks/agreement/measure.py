"""One policy, one engine format, one seed: sample once, then compare under every way of training.

All ways see the same samples. The gap is that of the first optimizer step, whose weights are those that the
engine sampled with; flips are counted on the expert ids with which `routed_experts` is called.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from agreement.models import Policy
from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import PolicyLossSettings
from miles.algorithms.mismatch import log_prob_gap
from miles.arch.precision import PrecisionPolicy
from miles.data.batch import TrainBatch, pack
from miles.data.sample import Sample
from miles.models import mlp
from miles.models.numerics import FAST, Numerics
from miles.models.routing_stats import compare_routes
from miles.precision.weight_format import PLAIN, in_format
from miles.rollout.engine import SamplingParams
from miles.rollout.generate import GenerationSettings, generate_group
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings

TIS_CLIP = 2.0
GROUP = 8


@dataclass(frozen=True)
class Way:
    """One column: what trainer and engine do about the gap."""

    name: str
    replay: bool = False
    correct: bool = False
    exact: bool = False
    rounded: bool = False
    """The trainer's weights are rounded like the engine's: what is left is arithmetic alone."""


WAYS = (
    Way("plain"),
    Way("R3", replay=True),
    Way("TIS", correct=True),
    Way("R3 + TIS", replay=True, correct=True),
    Way("true on-policy", exact=True),
    Way("R3, weights rounded", replay=True, rounded=True),
)


@dataclass(frozen=True)
class Setup:
    """What one model, format and seed are measured with."""

    policy: Policy
    engine_precision: PrecisionPolicy
    prompts: int
    seed: int
    exact_numerics: Numerics


def engine_of(setup: Setup, way: Way) -> NativeEngine:
    """The engine of a way: fp32 and exact for true on-policy, else in the setup's format."""
    policy = setup.policy
    dtype = torch.float32 if way.exact else PLAIN.get(setup.engine_precision.rollout.name, torch.float32)
    settings = EngineSettings(
        max_context_len=32,
        seed=setup.seed,
        dtype=dtype,
        numerics=setup.exact_numerics if way.exact else FAST,
    )
    engine = NativeEngine(policy.spec, settings)
    weights = policy.weights.items()
    sent = weights if way.exact else in_format(weights, setup.engine_precision)
    asyncio.run(engine.receive_weights(sent, version=0))
    return engine


def trainer_of(setup: Setup, way: Way) -> NativeTrainer:
    """An fp32 trainer that never moves: a learning rate of 0 keeps all measurements at one policy."""
    correction = ImportanceCorrection(0.0, TIS_CLIP) if way.correct else None
    settings = TrainerSettings(
        optimizer=OptimizerSettings(lr=0.0),
        algorithm=AlgorithmSettings(policy=PolicyLossSettings(correction=correction)),
        replay_routes=way.replay,
        probe_tokens=0,
    )
    numerics = setup.exact_numerics if way.exact else FAST
    trainer = NativeTrainer(setup.policy.spec, settings, numerics=numerics)
    weights = setup.policy.weights.items()
    trainer.load_weights(in_format(weights, setup.engine_precision) if way.rounded else weights)
    return trainer


def sample_batch(engine: NativeEngine, setup: Setup, groups: Sequence[list[Sample]]) -> TrainBatch:
    """Responses to the groups; a reward of every other sample gives every token an advantage."""
    policy = setup.policy
    sampling = SamplingParams(max_new_tokens=policy.max_response_len, stop_token_ids=policy.stop_token_ids)
    settings = GenerationSettings(sampling=sampling, max_context_len=32)

    async def all_groups() -> list[list[Sample]]:
        calls = (generate_group(engine, g, settings, policy.tokenizer.decode, setup.seed) for g in groups)
        return list(await asyncio.gather(*calls))

    samples = [sample for group in asyncio.run(all_groups()) for sample in group]
    for i, sample in enumerate(samples):
        sample.reward, sample.rollout_id = float(i % 2), i
    return pack(samples)


def prompt_groups(setup: Setup) -> list[list[Sample]]:
    """Groups of eight of the policy's own training prompts."""
    drawn = setup.policy.prompts.next_groups(setup.prompts)
    return [[replace(group[0], index=GROUP * i + j) for j in range(GROUP)] for i, group in enumerate(drawn)]


def measure(setup: Setup) -> dict[str, dict[str, float]]:
    """Figures of every way on one set of prompts."""
    groups = prompt_groups(setup)
    engines = {way.name: engine_of(setup, way) for way in WAYS}
    batch = sample_batch(engines["plain"], setup, groups)
    exact_batch = sample_batch(engines["true on-policy"], setup, groups)
    flipped = would_flip(setup, batch)
    figures = {}
    for way in WAYS:
        own = exact_batch if way.exact else batch
        figures[way.name] = compare(setup, way, own, None if way.exact else flipped)
    _price(setup, engines, groups, figures)
    return figures


def would_flip(setup: Setup, batch: TrainBatch) -> np.ndarray:
    """bool [T]: rows that the fp32 trainer sends to other experts in some layer when nothing is replayed."""
    trainer = trainer_of(setup, WAYS[0])
    with _dispatched() as ids:
        trainer.log_probs(batch)
    flips = _flips(_unshared(ids, trainer, batch), batch)
    return np.logical_or.reduce(flips, axis=1)


def compare(setup: Setup, way: Way, batch: TrainBatch, flipped: np.ndarray | None) -> dict[str, float]:
    """The gap of one way's training step."""
    trainer = trainer_of(setup, way)
    with _dispatched() as ids:
        log_probs = torch.from_numpy(trainer.log_probs(batch).log_probs)
        flips = _flips(_unshared(ids, trainer, batch), batch)
    rollout = torch.from_numpy(batch.rollout_log_probs)
    mask = torch.from_numpy(batch.loss_mask)
    gap = {name: float(value) for name, value in log_prob_gap(log_probs, rollout, mask).items()}
    figures = gap | {"flips": float(flips.mean()), "tokens_flipped": float(flips.any(1).mean())}
    if flipped is not None and (
        of_flipped := log_prob_gap(log_probs, rollout, mask * torch.from_numpy(flipped))
    ):
        figures["abs_diff_flipped"] = float(of_flipped["abs_diff"])
    if way.correct:
        figures["cut"] = trainer.train_step(batch).metrics["train/tis_clipfrac"]
    return figures


def _price(
    setup: Setup, engines: dict[str, NativeEngine], groups: Sequence[list[Sample]], figures: dict[str, Any]
) -> None:
    """Processor seconds of sampling and one training step, the ways in turn; the first round is warm-up."""
    trainers = {way.name: trainer_of(setup, way) for way in WAYS if not way.rounded}
    for _ in range(2):
        for way in WAYS:
            if way.rounded:
                continue
            started = time.process_time()
            batch = sample_batch(engines[way.name], setup, groups)
            if not way.replay:
                batch = replace(batch, routes=None)
            trainers[way.name].train_step(batch)
            seconds = time.process_time() - started
            figures[way.name]["tokens_per_second"] = batch.num_tokens / seconds


@contextmanager
def _dispatched() -> Iterator[list[Tensor]]:
    """Expert ids of every call of `routed_experts`, layer after layer."""
    calls: list[Tensor] = []
    run = mlp.routed_experts

    def spy(x: Tensor, ids: Tensor, *rest: Any) -> Tensor:
        calls.append(ids.clone())
        return run(x, ids, *rest)

    with patch.object(mlp, "routed_experts", spy):
        yield calls


def _unshared(ids: Sequence[Tensor], trainer: NativeTrainer, batch: TrainBatch) -> Tensor:
    """int64 [T, Lm, k] in the rows of the batch; a prompt that passed once stands for its whole group."""
    from miles.training.native.micro_batches import cut_micro_batches, trained_sequences
    from miles.training.native.shared_prompts import may_share_prompts

    share = may_share_prompts(trainer.decoder, trainer.settings, batch)
    parts = cut_micro_batches(batch, trained_sequences(batch), trainer.settings, share_prompts=share)
    layers = len(trainer.spec.moe_layers)
    assert len(ids) == layers * len(parts) and len(parts) == 1, "one micro-batch, one call per layer"
    stacked, shared = torch.stack(list(ids), 1), parts[0].shared
    return stacked if shared is None else stacked[torch.from_numpy(shared.row_of_packed)]


def _flips(dispatched_TLk: Tensor, batch: TrainBatch) -> np.ndarray:
    """bool [T, Lm]: another expert set than the engine's."""
    assert batch.routes is not None
    recorded = torch.from_numpy(batch.routes).long()
    layers = [
        compare_routes(dispatched_TLk[:, layer], recorded[:, layer])[0] for layer in range(recorded.shape[1])
    ]
    return torch.stack(layers, 1).numpy()
