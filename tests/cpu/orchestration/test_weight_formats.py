"""An engine in another number format than the trainer's has weights of its own, rounded once per version."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from miles.arch import load_spec
from miles.arch.precision import NumberFormat, PrecisionPolicy
from miles.config import resolve
from miles.data.tasks import resolve_builtin
from miles.orchestration.assemble import sglang_settings
from miles.orchestration.local_weights import OwnWeights
from miles.orchestration.train_worker import TrainWorker
from miles.orchestration.weight_packets import pack, unpack, verify
from miles.orchestration.weight_sync import RoundedWeights, weights_for_engine
from miles.planning import collect_facts, make_plan
from miles.planning.hardware import parse_hardware
from miles.precision.weight_format import PLAIN, rounded
from miles.rollout.native.engine import EngineSettings, NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import TrainerSettings
from miles.weights.native_map import to_published

EXPERT, ROUTER = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight"


@pytest.fixture
def trainer() -> TrainWorker:
    trainer = NativeTrainer(load_spec(resolve_builtin("builtin:sort")), TrainerSettings())
    trainer.init_weights(0)
    return TrainWorker(trainer, None)


def engine_for(trainer: TrainWorker, target: PrecisionPolicy) -> NativeEngine:
    dtype = PLAIN.get(target.rollout.name, torch.float32)
    settings = EngineSettings(max_context_len=32, seed=1, dtype=dtype, precision=target)
    return NativeEngine(trainer.trainer.spec, settings)


def served_by(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Under published names; quantised weights as the numbers they stand for."""
    decoder = engine.decoder
    for block in decoder.modules():
        for name in getattr(block, "operands", {}):
            block.register_parameter(name, torch.nn.Parameter(block.matrix(name), requires_grad=False))
    return dict(to_published(decoder))


@pytest.mark.parametrize(
    ("profile", "hardware", "repacks"),
    [("qwen3-moe-fp8", "16xH100", False), ("deepseek-v3-int4-single-node", "144xH200", True)],
)
def test_a_server_of_int4_experts_is_known_to_repack_them(profile: str, hardware: str, repacks: bool) -> None:
    config = resolve(profile).config
    plan = make_plan(resolve(profile), collect_facts(config, assume=parse_hardware(hardware)))
    assert sglang_settings(config, plan).repacks is repacks


@pytest.mark.parametrize("name", ["bf16", "fp8", "int4"])
def test_the_engine_serves_the_rounded_weights_and_the_trainer_keeps_its_own(
    name: Any, trainer: TrainWorker
) -> None:
    target = PrecisionPolicy(NumberFormat(name))
    engine = engine_for(trainer, target)
    asyncio.run(RoundedWeights(trainer, engine, target).send(version=3))
    own, served = dict(trainer.trainer.named_weights()), served_by(engine)
    assert engine.health().weight_version == 3
    assert torch.equal(served[EXPERT].float(), rounded(target, EXPERT, own[EXPERT]).float())
    assert not torch.equal(served[EXPERT].float(), own[EXPERT])
    assert torch.equal(served[ROUTER].float(), own[ROUTER]) == (name != "bf16"), "quantised formats skip it"


def test_a_server_that_is_replaced_while_the_trainer_steps_gets_the_version_it_missed(
    trainer: TrainWorker,
) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.trainer.named_weights()}
    packet = asyncio.run(OwnWeights(trainer, None).weights(version=3))
    with torch.no_grad():
        for _, weight in trainer.trainer.named_weights():
            weight.add_(1.0)  # as an optimizer does, in place
    verify(packet.manifest, packet.weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unpack(packet.weights))


def test_a_later_update_of_the_trainer_reaches_the_engine_only_with_the_next_version(
    trainer: TrainWorker,
) -> None:
    target = PrecisionPolicy(NumberFormat("bf16"))
    engine = engine_for(trainer, target)
    sync = RoundedWeights(trainer, engine, target)
    asyncio.run(sync.send(version=0))
    before = served_by(engine)[EXPERT].clone()
    with torch.no_grad():
        dict(trainer.trainer.named_weights())[EXPERT].add_(1.0)
    assert torch.equal(served_by(engine)[EXPERT], before)
    asyncio.run(sync.send(version=1))
    own = dict(trainer.trainer.named_weights())[EXPERT]
    assert torch.equal(served_by(engine)[EXPERT], own.bfloat16())


def test_packets_between_processes_carry_the_engines_format(trainer: TrainWorker) -> None:
    manifest, weights = pack(weights_for_engine(trainer, PrecisionPolicy(NumberFormat("bf16"))), version=2)
    verify(manifest, weights)
    assert {tensor.dtype for _, tensor in unpack(weights)} == {torch.bfloat16}
    plain = pack(weights_for_engine(trainer, None), version=2)[1]
    sizes = [sum(array.nbytes for _, array in packet.values()) for packet in (weights, plain)]
    assert sizes[0] * 2 == sizes[1]
