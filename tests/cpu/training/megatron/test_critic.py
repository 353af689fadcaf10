"""PPO's critic in Megatron's form learns what the native one does, and is kept in either form on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from miles.algorithms.losses import PolicyLossSettings
from miles.arch import ArchSpec
from miles.arch.precision import NumberFormat, precision_policy
from miles.data.batch import TrainBatch
from miles.errors import CheckpointError
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, CriticSettings, OptimizerSettings, TrainerSettings
from tests.cpu.training.megatron.test_families import family_spec

Batches = Callable[..., TrainBatch]
Either = NativeTrainer | MegatronTrainer

PPO = TrainerSettings(
    optimizer=OptimizerSettings(lr=1e-3),
    algorithm=AlgorithmSettings(advantage_estimator="ppo", gamma=0.99, lambd=0.95),
    critic=CriticSettings(lr=2e-3),
    max_tokens_per_micro_batch=40,
)
ALONE_AT_FIRST = replace(PPO, critic=CriticSettings(lr=2e-3, num_critic_only_steps=2))

CASES = {
    "one step": PPO,
    "two steps per rollout, values clipped": replace(
        PPO, num_steps_per_rollout=2, critic=CriticSettings(lr=2e-2, value_clip=0.01)
    ),
    "the critic alone at first": ALONE_AT_FIRST,
}
MORE_CASES = {
    "KL in the reward": replace(PPO, algorithm=replace(PPO.algorithm, kl_coef=0.1)),
    "every layer recomputed": replace(PPO, recompute_num_layers=3),
    "entropy, one sequence at a time": replace(
        PPO,
        max_tokens_per_micro_batch=None,
        micro_batch_size=1,
        algorithm=replace(PPO.algorithm, policy=PolicyLossSettings(entropy_coef=0.01)),
    ),
}


def started(trainer: Either, seed: int = 0) -> Either:
    trainer.init_weights(seed)
    trainer.start_critic()
    if trainer.settings.algorithm.needs_reference:
        other = NativeTrainer(trainer.spec, TrainerSettings())
        other.init_weights(1)
        trainer.load_weights(other.named_weights(), "reference")
    return trainer


def pair(spec: ArchSpec, settings: TrainerSettings = PPO, **more) -> tuple[NativeTrainer, MegatronTrainer]:
    native, megatron = NativeTrainer(spec, settings, **more), MegatronTrainer(spec, settings, **more)
    started(native), started(megatron)
    return native, megatron


def critic_of(trainer: Either) -> dict[str, torch.Tensor]:
    """Its weights under published names."""
    critic = trainer.critic
    assert critic is not None
    if isinstance(trainer, NativeTrainer):
        found = trainer.layout.published(critic.spec, dict(critic.decoder.named_parameters()))
    else:
        found = critic.tensors.published(trainer.dtype)
    return {name: tensor.clone() for name, tensor in found}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(t, right[n]) for n, t in left.items())


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


def assert_alike(ours: dict[str, float], theirs: dict[str, float]) -> None:
    ours, theirs = untimed(ours), untimed(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        scale = 1e-3 if name.endswith("grad_norm") else 1e-4
        assert value == pytest.approx(theirs[name], rel=scale, abs=1e-4), name


@pytest.mark.parametrize("moe", [True, False])
def test_a_new_critic_is_the_policy_with_a_head_of_zeros(moe: bool, spec, dense_spec) -> None:
    trainer = started(MegatronTrainer(spec if moe else dense_spec, PPO))
    found, policy = critic_of(trainer), {name: t.clone() for name, t in trainer.named_weights()}
    assert found.pop("score.weight").tolist() == [[0.0] * spec.hidden_size]
    assert same(found, policy)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)]
)
def test_three_rollouts_equal_the_native_trainers(case: str, spec: ArchSpec, make_batch: Batches) -> None:
    settings = (CASES | MORE_CASES)[case]
    native, megatron = pair(spec, settings)
    for seed in range(3):
        batch = make_batch(spec, seed=seed, noise=0.3, one_prompt_per_group=True)
        ours, theirs = megatron.train_step(batch).metrics, native.train_step(batch).metrics
        assert_alike(ours, theirs)
    assert {"train/value_loss", "train/critic_grad_norm", "train/critic_lr"} <= ours.keys()
    assert ours["rollout/values"] != 0
    assert ours["train/value_clipfrac"] > 0 or settings.critic.value_clip > 0.1
    assert (megatron.state.step, megatron.state.critic) == (native.state.step, native.state.critic)
    expected = critic_of(native)
    for name, tensor in critic_of(megatron).items():
        # Adam turns rounding of gradients near 0 into steps of up to the learning rate.
        assert (tensor - expected[name]).abs().mean() <= 2e-5, name


def test_the_first_step_is_the_native_trainers_to_fp32_rounding(spec: ArchSpec, make_batch: Batches) -> None:
    native, megatron = pair(spec)
    batch = make_batch(spec, noise=0.3)
    ours, theirs = megatron.train_step(batch).metrics, native.train_step(batch).metrics
    for name in ("train/loss", "train/value_loss", "train/critic_grad_norm", "train/grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    np.testing.assert_allclose(megatron._values(batch), native._values(batch), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "gemma2", "llama4_text"])
def test_critics_of_other_families_equal_the_native_trainers(family: str, make_batch: Batches) -> None:
    """Latent attention, an indexer that stays as published, soft caps and tied heads, chunks."""
    spec = family_spec(family)
    native, megatron = pair(spec)
    for seed in range(2):
        batch = make_batch(spec, seed=seed)
        ours, theirs = megatron.train_step(batch).metrics, native.train_step(batch).metrics
        assert_alike(ours, theirs)
    assert critic_of(megatron).keys() == critic_of(native).keys()


def test_bf16_critics_have_fp32_masters(spec: ArchSpec, make_batch: Batches) -> None:
    native, megatron = pair(spec, dtype=torch.bfloat16)
    batch = make_batch(spec)
    ours, theirs = (trainer.train_step(batch).metrics for trainer in (megatron, native))
    assert ours["train/critic_grad_norm"] == pytest.approx(theirs["train/critic_grad_norm"], rel=0.03)
    assert {tensor.dtype for tensor in critic_of(megatron).values()} == {torch.bfloat16}
    on_disk = megatron._critic_on_disk
    assert on_disk is not None and "master" in on_disk.optimizer_state()


def test_the_critic_routes_by_itself_and_rounds_nothing(spec: ArchSpec, make_batch: Batches) -> None:
    int4 = NumberFormat("int4", group_size=4)
    rounds = replace(PPO, precision=precision_policy(spec, "fp32", int4, int4))
    plain, rounded = (started(MegatronTrainer(spec, settings)) for settings in (PPO, rounds))
    batch = make_batch(spec, noise=3.0)
    assert batch.routes is not None
    plain.train_step(batch)
    other = replace(batch, routes=(batch.routes + 1) % spec.num_experts)
    np.testing.assert_array_equal(plain._values(batch), plain._values(other))
    assert (plain.log_probs(batch).log_probs != plain.log_probs(other).log_probs).any()
    assert rounded.critic.chunks.rounded == {} != rounded._chunks.rounded


def test_a_sick_critic_is_not_updated(spec: ArchSpec, make_batch: Batches) -> None:
    trainer = started(MegatronTrainer(spec, PPO))
    before, bad = critic_of(trainer), make_batch(spec)
    bad = bad.with_rows(
        values=np.zeros(bad.num_tokens, np.float32),
        advantages=np.zeros(bad.num_tokens, np.float32),
        returns=np.where(bad.loss_mask > 0, np.float32(np.inf), np.float32(0)),
    )
    result = trainer.train_step(bad)
    assert same(critic_of(trainer), before)
    assert [event["tensor"] for event in result.events] == ["returns"]
    assert (trainer.state.updates, trainer.state.critic.updates) == (1, 0)
    assert "train/critic_non_finite_elements" not in trainer.train_step(make_batch(spec, seed=1)).metrics
    assert not same(critic_of(trainer), before)


FORMS = {"published names": False, "torch_dist": True}


@pytest.mark.parametrize("dist_checkpoints", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_a_resumed_critic_is_the_same_bits(
    dtype: torch.dtype, dist_checkpoints: bool, spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    """Cut off in the middle of its warm-up."""
    batches = [make_batch(spec, seed=seed) for seed in range(4)]

    def make(seed: int) -> Either:
        how = {"dtype": dtype, "dist_checkpoints": dist_checkpoints}
        return started(MegatronTrainer(spec, ALONE_AT_FIRST, **how), seed)

    straight, first, second = make(0), make(0), make(5)
    rows = [untimed(straight.train_step(batch).metrics) for batch in batches]
    assert ["train/loss" in row for row in rows] == [False, False, True, True]
    first.train_step(batches[0])
    first.save(tmp_path)
    assert (tmp_path / "critic").is_dir() != dist_checkpoints
    second.load(tmp_path)
    assert second.state.critic == first.state.critic
    assert [untimed(second.train_step(batch).metrics) for batch in batches[1:]] == rows[1:]
    assert same(critic_of(second), critic_of(straight))


@pytest.mark.slow
def test_a_critic_is_saved_in_the_background(spec: ArchSpec, make_batch: Batches, tmp_path: Path) -> None:
    """As it was at the moment it was asked for."""
    how = {"dist_checkpoints": True, "background_saves": True}
    first, second = make_batch(spec, seed=0), make_batch(spec, seed=1)
    trainer, again = (started(MegatronTrainer(spec, PPO, **how), seed) for seed in (0, 5))
    trainer.train_step(first)
    trainer.save(tmp_path)
    saved, row = critic_of(trainer), trainer.train_step(second).metrics
    assert trainer.finish_saving(wait=True)
    again.load(tmp_path)
    assert same(critic_of(again), saved) and not same(saved, critic_of(trainer))
    assert untimed(again.train_step(second).metrics) == untimed(row)


@pytest.mark.parametrize("dist_checkpoints", FORMS.values(), ids=FORMS.keys())
def test_a_run_takes_a_critic_up_and_leaves_it(
    dist_checkpoints: bool, spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    def grpo() -> MegatronTrainer:
        trainer = MegatronTrainer(spec, TrainerSettings(), dist_checkpoints=dist_checkpoints)
        trainer.init_weights(0)
        return trainer

    for name in ("grpo", "ppo"):
        (tmp_path / name).mkdir()
    without = grpo()
    without.train_step(make_batch(spec))
    without.save(tmp_path / "grpo")
    trainer = started(MegatronTrainer(spec, ALONE_AT_FIRST, dist_checkpoints=dist_checkpoints))
    trainer.load(tmp_path / "grpo")
    assert "train/loss" not in trainer.train_step(make_batch(spec)).metrics, "its new critic warms up"
    trainer.save(tmp_path / "ppo")
    after = grpo()
    after.load(tmp_path / "ppo")
    assert after.state.critic is None and after.step == 2


def test_a_critic_goes_on_under_the_other_trainer(
    spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    first, second = make_batch(spec, seed=0), make_batch(spec, seed=1)
    ways = {"native": NativeTrainer, "megatron": MegatronTrainer}
    for name, make in ways.items():
        (tmp_path / name).mkdir()
        trainer = started(make(spec, PPO))
        trainer.train_step(first)
        trainer.save(tmp_path / name)
        saved, row = critic_of(trainer), trainer.train_step(second).metrics
        other = ways["megatron" if name == "native" else "native"](spec, PPO)
        other.load(tmp_path / name)
        assert same(critic_of(other), saved)
        assert_alike(other.train_step(second).metrics, row)
        expected = critic_of(trainer)
        for key, tensor in critic_of(other).items():
            assert (tensor - expected[key]).abs().mean() <= 2e-5, "moments went along"


def test_a_critic_starts_from_one_that_another_run_saved(
    spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    """`--critic-load`: model weights alone, its optimizer is new."""
    from miles.arch import load_spec
    from miles.weights.hf import read_hf

    teacher, where = started(MegatronTrainer(spec, PPO)), tmp_path / "critic" / "model"
    teacher.train_step(make_batch(spec))
    teacher.save(tmp_path)
    trainer = started(MegatronTrainer(spec, PPO))
    trainer.load_critic(load_spec(where), read_hf(where))
    assert same(critic_of(trainer), critic_of(teacher))
    assert critic_of(trainer)["score.weight"].abs().max() > 0


@pytest.mark.parametrize("name", ["critic/model/model.safetensors", "critic/optimizer/exp_avg.safetensors"])
def test_a_damaged_critic_is_refused_by_name(name: str, spec: ArchSpec, tmp_path: Path) -> None:
    trainer = started(MegatronTrainer(spec, PPO))
    trainer.save(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=path.name):
        trainer.load(tmp_path)
