"""The draft travels with the policy: same way, same version, and a packet without it is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from miles.arch import load_spec, with_mtp
from miles.arch.precision import NumberFormat, PrecisionPolicy
from miles.data.tasks import resolve_builtin
from miles.errors import CheckpointError
from miles.orchestration.train_worker import TrainWorker
from miles.orchestration.weight_packets import WeightsDamaged, pack, unpack, verify
from miles.orchestration.weight_sync import RoundedWeights, SharedWeights, weights_for_engine
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import TrainerSettings
from miles.weights.native_map import to_published

FC = "mtp.fc.weight"


@pytest.fixture
def trainer() -> TrainWorker:
    trainer = NativeTrainer(with_mtp(load_spec(resolve_builtin("builtin:sort")), 1), TrainerSettings())
    trainer.init_weights(0)
    return TrainWorker(trainer, None)


def engine_for(trainer: TrainWorker, dtype: torch.dtype = torch.float32) -> NativeEngine:
    return NativeEngine(trainer.trainer.spec, EngineSettings(max_context_len=32, seed=1, dtype=dtype))


def served_by(engine: NativeEngine) -> dict[str, torch.Tensor]:
    decoder: Any = engine._runner.decoder
    return dict(to_published(decoder, engine._runner.draft))


def test_one_process_shares_the_draft_without_a_copy(trainer: TrainWorker) -> None:
    engine = engine_for(trainer)
    asyncio.run(SharedWeights(trainer, engine).send(version=4))
    assert engine.health().weight_version == 4
    own = dict(trainer.trainer.named_weights())
    assert served_by(engine)[FC].data_ptr() == own[FC].data_ptr()


def test_a_draft_in_another_format_follows_with_the_next_version(trainer: TrainWorker) -> None:
    engine, target = engine_for(trainer, torch.bfloat16), PrecisionPolicy(NumberFormat("bf16"))
    sync = RoundedWeights(trainer, engine, target)
    asyncio.run(sync.send(version=0))
    with torch.no_grad():
        dict(trainer.trainer.named_weights())[FC].add_(1.0)
    own = dict(trainer.trainer.named_weights())[FC]
    assert not torch.equal(served_by(engine)[FC], own.bfloat16())
    asyncio.run(sync.send(version=1))
    assert torch.equal(served_by(engine)[FC], own.bfloat16())


def test_a_packet_brings_policy_and_draft_of_one_version_or_nothing(trainer: TrainWorker) -> None:
    engine = engine_for(trainer)
    manifest, weights = pack(weights_for_engine(trainer, None), version=7)
    verify(manifest, weights)
    asyncio.run(engine.receive_weights(unpack(weights), manifest.version))
    own = dict(trainer.trainer.named_weights())
    assert engine.health().weight_version == 7
    assert all(torch.equal(tensor, own[name]) for name, tensor in served_by(engine).items())
    lost = {name: array for name, array in weights.items() if name != FC}
    with pytest.raises(WeightsDamaged, match=f"arrived without {FC}"):
        verify(manifest, lost)
    with pytest.raises(CheckpointError, match=f"missing .*{FC}"):
        asyncio.run(engine.receive_weights(unpack(lost), 8))
    assert not engine.health().ok
