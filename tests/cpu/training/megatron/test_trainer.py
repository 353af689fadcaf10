"""The Megatron trainer does what the native one does: same metrics, same weights, same routes, same files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from low_precision_support import Pair, stacked_spec

from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import LossOutput, LossRows, PolicyLossSettings
from miles.algorithms.rejection import Rejection
from miles.arch import ArchSpec
from miles.arch.precision import NumberFormat, precision_policy
from miles.data.batch import TrainBatch
from miles.precision.weight_format import dequantised, quantised
from miles.training.megatron.groups import open_groups
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import (
    AlgorithmSettings,
    FaultInjection,
    OptimizerSettings,
    TrainerSettings,
)

Batches = Callable[..., TrainBatch]
SETTINGS = TrainerSettings(optimizer=OptimizerSettings(lr=1e-2), max_tokens_per_micro_batch=40)


def own_loss(rows: LossRows) -> LossOutput:
    assert rows.advantages_T is not None
    loss = -(rows.weights_T * rows.advantages_T * rows.log_probs_T).sum()
    return LossOutput(loss, {"loss": loss.detach(), "custom/rows": rows.loss_mask_T.sum()})


def own_advantages(batch: TrainBatch) -> np.ndarray:
    return np.repeat(batch.rewards - batch.rewards.mean(), batch.lengths)


def own_reduction(batch: TrainBatch, num_rollouts: int) -> torch.Tensor:
    return torch.from_numpy(batch.loss_mask) / (7 * num_rollouts)


CASES = {
    "one step, dynamic batches": SETTINGS,
    "two steps per rollout": replace(SETTINGS, num_steps_per_rollout=2),
    "every layer recomputed": replace(SETTINGS, recompute_num_layers=3),
    "two of three layers recomputed": replace(SETTINGS, recompute_num_layers=2),
    "attention alone recomputed": replace(SETTINGS, recompute_modules=frozenset({"core_attn"})),
    "attention and experts recomputed": replace(SETTINGS, recompute_modules=frozenset({"core_attn", "moe"})),
    "entropy, no replay, one sequence at a time": replace(
        SETTINGS,
        max_tokens_per_micro_batch=None,
        micro_batch_size=1,
        replay_routes=False,
        algorithm=AlgorithmSettings(policy=PolicyLossSettings(entropy_coef=0.01), temperature=0.7),
    ),
    "reference": replace(
        SETTINGS,
        algorithm=AlgorithmSettings(use_kl_loss=True, policy=PolicyLossSettings(kl_loss_coef=0.1)),
    ),
    "own loss and advantages": replace(
        SETTINGS,
        algorithm=AlgorithmSettings("custom_loss", custom_loss=own_loss, custom_advantages=own_advantages),
    ),
    "own reduction": replace(SETTINGS, algorithm=AlgorithmSettings(custom_reducer=own_reduction)),
    "corrections of sequences": replace(
        SETTINGS,
        algorithm=AlgorithmSettings(
            policy=PolicyLossSettings(
                correction=ImportanceCorrection(0.9, 1.02, level="sequence", batch_normalize=True),
                rejection=Rejection("geometric", 0.99, 1.01, veto=0.5),
                mismatch_metrics=True,
            )
        ),
    ),
}


def pair(spec: ArchSpec, settings: TrainerSettings, **more) -> tuple[NativeTrainer, MegatronTrainer]:
    trainers = NativeTrainer(spec, settings, **more), MegatronTrainer(spec, settings, **more)
    for trainer in trainers:
        trainer.init_weights(0)
        if settings.algorithm.needs_reference:
            other = NativeTrainer(spec, settings)
            other.init_weights(1)
            trainer.load_weights(other.named_weights(), "reference")
    return trainers


def assert_same_metrics(ours: dict[str, float], theirs: dict[str, float]) -> None:
    measured = {name for name in ours | theirs if not name.startswith("perf/")}
    assert measured <= ours.keys() & theirs.keys()
    for name in measured:
        scale = 1e-3 if name == "train/grad_norm" else 1e-4
        assert ours[name] == pytest.approx(theirs[name], rel=scale, abs=1e-4), name


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_three_steps_equal_the_native_trainers(
    settings: TrainerSettings, spec: ArchSpec, make_batch: Batches
) -> None:
    native, megatron = pair(spec, settings)
    for seed in range(3):
        batch = make_batch(spec, seed=seed, noise=0.3, one_prompt_per_group=True)
        assert_same_metrics(megatron.train_step(batch).metrics, native.train_step(batch).metrics)
    assert megatron.step == native.step
    expected = dict(native.named_weights())
    for name, tensor in megatron.named_weights():
        # Adam turns rounding of gradients near 0 into steps of up to the learning rate.
        assert (tensor - expected[name]).abs().mean() <= 1e-5, name


INT4 = NumberFormat("int4", group_size=4)


def test_int4_qat_equals_the_native_trainers(spec: ArchSpec, make_batch: Batches) -> None:
    """Losses, gradient norms and what rounding did, of policy and reference; all but one layer's experts."""
    policy = precision_policy(spec, "fp32", INT4, INT4, kept=("layers.2.",))
    settings = replace(CASES["reference"], precision=policy)
    native, megatron = pair(spec, settings)
    plain = pair(spec, CASES["reference"])[1]
    batch = make_batch(spec, noise=0.3, one_prompt_per_group=True)
    rounded, theirs, free = (t.log_probs(batch).log_probs for t in (megatron, native, plain))
    assert np.nanmax(np.abs(rounded - theirs)) <= 1e-4
    assert np.nanmean(np.abs(rounded - free)) > 1e-3, "nothing was rounded"
    for seed in range(3):
        batch = make_batch(spec, seed=seed, noise=0.3, one_prompt_per_group=True)
        ours = megatron.train_step(batch).metrics
        assert_same_metrics(ours, native.train_step(batch).metrics)
    assert "precision/weight_error/layer_1" in ours and "precision/weight_error/layer_2" not in ours
    expected = dict(native.named_weights())
    for name, tensor in megatron.named_weights():
        assert (tensor - expected[name]).abs().mean() <= 1e-5, name


def test_an_int4_engine_samples_from_what_is_trained() -> None:
    int4 = NumberFormat("int4")
    both, engine_alone = (Pair(t, int4, make=MegatronTrainer).gap() for t in (int4, NumberFormat("fp32")))
    assert both < 2e-6 < 1e-3 < engine_alone
    assert Pair(int4, int4, spec=stacked_spec(), make=MegatronTrainer).gap() < 2e-6, "stacked: as split"


class Grouped(torch.nn.Module):
    """Holds and reads its weights as Transformer Engine's grouped experts do, which need a GPU."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(2):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.randn(6, 8)))

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        weights = [getattr(self, f"weight{number}") for number in range(2)]
        return torch.cat([part @ w.t() for part, w in zip(x.split(m_splits), weights, strict=True)])


def test_grouped_experts_are_rounded_and_keep_their_parameters(spec: ArchSpec) -> None:
    open_groups(MegatronLayout(), spec.num_layers)
    from miles.training.megatron.pieces import Piece, Place
    from miles.training.megatron.rounded_weights import fake_quantise

    model = torch.nn.Module()
    model.experts = experts = Grouped()
    own = dict(experts.named_parameters())
    found = [
        Place(f"experts.weight{i}", (Piece(name, 0, 0, 6, lambda local: local),), True)
        for i, name in enumerate(f"model.layers.1.mlp.experts.{4 + e}.down_proj.weight" for e in range(2))
    ]
    layers = fake_quantise(precision_policy(spec, "fp32", INT4, INT4), model, found)
    assert [len(operands) for operands in layers.values()] == [2]
    x, direction = torch.randn(5, 8), torch.randn(5, 6)
    output = experts(x, [2, 3])
    rounded = [dequantised(quantised(INT4, weight.detach())) for weight in own.values()]
    assert torch.equal(output, torch.cat([x[:2] @ rounded[0].t(), x[2:] @ rounded[1].t()]))
    (output * direction).sum().backward()
    assert torch.equal(own["weight1"].grad, direction[2:].t() @ x[2:]), "the gradient of the identity"
    with pytest.raises(RuntimeError):
        experts(x, [1, 1])
    assert all(experts.get_parameter(name) is weight for name, weight in own.items())


def test_a_dense_model(dense_spec: ArchSpec, make_batch: Batches) -> None:
    native, megatron = pair(dense_spec, SETTINGS)
    batch = make_batch(dense_spec)
    assert_same_metrics(megatron.train_step(batch).metrics, native.train_step(batch).metrics)


def test_bf16_trains_on_fp32_masters(spec: ArchSpec, make_batch: Batches) -> None:
    native, megatron = pair(spec, SETTINGS, dtype=torch.bfloat16)
    batch = make_batch(spec)
    ours, theirs = (trainer.train_step(batch).metrics for trainer in (megatron, native))
    assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=0.03)
    expected = dict(native.named_weights())
    for name, tensor in megatron.named_weights():
        assert tensor.dtype == torch.bfloat16
        assert (tensor - expected[name]).abs().float().mean() <= 2e-3, name


def dispatched(trainer: MegatronTrainer, batch: TrainBatch) -> np.ndarray:
    """The experts that every row was really sent to, int16 [T, L, k], ascending: seen at the dispatchers."""
    seen: dict[int, list[torch.Tensor]] = {}
    (chunk,) = trainer._chunks.bare
    handles = []
    for column, layer in enumerate(chunk.routes.layers):
        dispatcher = layer.mlp.token_dispatcher
        original = dispatcher.dispatch_preprocess

        def spy(hidden, routing_map, probs, column=column, original=original):
            seen.setdefault(column, []).append(routing_map.clone())
            return original(hidden, routing_map, probs)

        dispatcher.dispatch_preprocess = spy
        handles.append((dispatcher, original))
    trainer.log_probs(batch)
    for dispatcher, original in handles:
        dispatcher.dispatch_preprocess = original
    maps = torch.stack([torch.cat(seen[column]) for column in sorted(seen)], 1)
    top_k = trainer.spec.top_k
    return maps.int().topk(top_k, dim=-1).indices.sort(-1).values.to(torch.int16).numpy()


def test_the_engines_experts_reach_the_dispatchers(spec: ArchSpec, make_batch: Batches) -> None:
    """R3: what is dispatched is what the engine recorded, and shifted by one row it is not."""
    settings = replace(SETTINGS, max_tokens_per_micro_batch=None)  # one micro-batch, rows in order
    trainer = MegatronTrainer(spec, settings)
    trainer.init_weights(0)
    batch = make_batch(spec, noise=2.0)
    assert batch.routes is not None
    recorded = np.sort(batch.routes, -1)
    used = dispatched(trainer, batch)
    assert (used == recorded).all()
    shifted = batch.with_rows(routes=np.roll(batch.routes, 1, axis=0))
    assert not (dispatched(trainer, shifted) == recorded).all()
    metrics = trainer.train_step(batch).metrics
    assert metrics["route/dispatched_flip_frac"] == 0 and metrics["route/flip_frac"] > 0.1

    without = MegatronTrainer(spec, replace(settings, replay_routes=False))
    without.init_weights(0)
    assert without.train_step(batch).metrics["route/dispatched_flip_frac"] > 0.1


def test_rows_without_a_recorded_route_decide(spec: ArchSpec, make_batch: Batches) -> None:
    settings = replace(SETTINGS, max_tokens_per_micro_batch=None)
    trainer = MegatronTrainer(spec, settings)
    trainer.init_weights(0)
    batch = make_batch(spec, noise=2.0)
    assert batch.routes is not None
    gaps = batch.routes.copy()
    gaps[::3] = -1
    free = dispatched(trainer, replace(batch, routes=None))
    used = dispatched(trainer, batch.with_rows(routes=gaps))
    kept = np.arange(batch.num_tokens) % 3 != 0
    assert (used[kept] == np.sort(batch.routes, -1)[kept]).all()
    assert (used[~kept][:1] == free[~kept][:1]).all()  # later rows attend to rows routed otherwise


def test_a_run_goes_on_bit_for_bit_and_on_the_other_trainer(
    spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    first, second = make_batch(spec, seed=0), make_batch(spec, seed=1)
    whole = pair(spec, SETTINGS)[1]
    whole.train_step(first)
    whole.save(tmp_path)
    whole.train_step(second)

    again = MegatronTrainer(spec, SETTINGS)
    again.load(tmp_path)
    again.train_step(second)
    expected = dict(whole.named_weights())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.named_weights())

    other = NativeTrainer(spec, SETTINGS)
    other.load(tmp_path)
    assert other.step == 1
    other.train_step(second)
    for name, tensor in other.named_weights():
        assert (tensor - expected[name]).abs().mean() <= 1e-5, name


def test_a_gradient_that_is_not_finite_skips_the_step_and_names_the_tensor(
    spec: ArchSpec, make_batch: Batches
) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    settings = replace(SETTINGS, fault=FaultInjection("nan_grad", 0, name))
    trainer = MegatronTrainer(spec, settings)
    trainer.init_weights(0)
    before = {key: tensor.clone() for key, tensor in trainer.named_weights()}
    result = trainer.train_step(make_batch(spec))
    (event,) = result.events
    assert (event["what"], event["tensor"], event["count"]) == ("gradient", name, 1)
    assert result.metrics["train/step_skipped"] == 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in trainer.named_weights())
    assert trainer.train_step(make_batch(spec, seed=1)).metrics["train/step_skipped"] == 0


def test_an_earlier_policy_as_the_reference_survives_a_checkpoint(
    spec: ArchSpec, make_batch: Batches, tmp_path: Path
) -> None:
    native, megatron = pair(spec, CASES["reference"])
    for trainer in (native, megatron):
        trainer.train_step(make_batch(spec))
        trainer.update_reference()
        trainer.train_step(make_batch(spec, seed=1))
    megatron.save(tmp_path)
    expected = native.log_probs(make_batch(spec), "reference").log_probs
    resumed, _ = pair(spec, CASES["reference"])
    resumed.load(tmp_path)
    np.testing.assert_allclose(
        megatron.log_probs(make_batch(spec), "reference").log_probs, expected, atol=1e-3
    )
    np.testing.assert_allclose(
        resumed.log_probs(make_batch(spec), "reference").log_probs, expected, atol=1e-3
    )


def test_a_teacher_advises_as_beside_the_native_trainer(
    spec: ArchSpec, dense_spec: ArchSpec, make_batch: Batches
) -> None:
    native, megatron = pair(spec, replace(SETTINGS, algorithm=AlgorithmSettings(opd_kl_coef=0.5)))
    model = NativeTrainer(dense_spec, SETTINGS)
    model.init_weights(9)
    for trainer in (native, megatron):
        trainer.load_teacher(dense_spec, model.named_weights())
    batch = make_batch(spec, noise=0.3)
    ours, theirs = megatron.train_step(batch).metrics, native.train_step(batch).metrics
    assert_same_metrics(ours, theirs)
    assert ours["rollout/opd_reverse_kl"] != 0
