"""Rollout routing replay (R3) is real: the trainer runs the experts that the engine reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.errors import DataError
from miles.models import mlp
from miles.models.attention import PackedAttention
from miles.models.routing import Router
from miles.training.native.probe import gap_without_replay
from miles.training.settings import AlgorithmSettings, TrainerSettings

ONE_STEP = TrainerSettings(probe_tokens=0)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Expert ids at the moment of dispatch: what `routed_experts` is called with, call by call."""
    calls: list[torch.Tensor] = []
    run: Callable = mlp.routed_experts

    def spy(x, ids, *rest):
        calls.append(ids.clone())
        return run(x, ids, *rest)

    monkeypatch.setattr(mlp, "routed_experts", spy)
    return calls


def routes_of(calls: list[torch.Tensor], num_layers: int = 2) -> np.ndarray:
    """int16 [T, Lm, k] from one call per MoE layer."""
    assert len(calls) == num_layers
    return torch.stack(calls, 1).to(torch.int16).numpy()


def test_the_training_forward_dispatches_to_the_engines_experts(
    spec, make_trainer, make_batch, dispatched
) -> None:
    batch = make_batch(spec, noise=0.5)
    dispatched.clear()
    result = make_trainer(spec, ONE_STEP).train_step(batch)
    assert result.metrics["route/flip_frac"] > 0.05, "the trainer would have chosen otherwise"
    np.testing.assert_array_equal(routes_of(dispatched), batch.routes)
    assert result.metrics["route/replayed_rows_frac"] == 1.0
    assert result.metrics["route/dispatched_flip_frac"] == 0.0


def test_recompute_in_backward_dispatches_to_them_again(spec, make_trainer, make_batch, dispatched) -> None:
    batch = make_batch(spec, noise=0.5)
    dispatched.clear()
    make_trainer(spec, replace(ONE_STEP, recompute_num_layers=3)).train_step(batch)
    np.testing.assert_array_equal(routes_of(dispatched[:2]), batch.routes)
    # Backward recomputes the last layer first.
    np.testing.assert_array_equal(routes_of(dispatched[2:][::-1]), batch.routes)


def test_the_log_prob_pass_dispatches_to_them(spec, make_trainer, make_batch, dispatched) -> None:
    batch = make_batch(spec, noise=0.5)
    dispatched.clear()
    result = make_trainer(spec, ONE_STEP).log_probs(batch)
    np.testing.assert_array_equal(routes_of(dispatched), batch.routes)
    assert result.replayed


def test_every_micro_batch_gets_its_own_rows(spec, make_trainer, make_batch, dispatched) -> None:
    batch = make_batch(spec, noise=0.5)
    dispatched.clear()
    make_trainer(spec, replace(ONE_STEP, micro_batch_size=5)).train_step(batch)
    layers = [torch.cat(dispatched[layer::2]) for layer in range(2)]
    np.testing.assert_array_equal(routes_of(layers), batch.routes)


def test_the_reference_decides_for_itself(spec, make_trainer, make_batch, dispatched) -> None:
    settings = replace(ONE_STEP, algorithm=AlgorithmSettings(use_kl_loss=True))
    trainer = make_trainer(spec, settings)
    trainer.load_weights(make_trainer(spec, seed=7).named_weights(), "reference")
    batch = make_batch(spec)
    dispatched.clear()
    result = trainer.log_probs(batch, "reference")
    assert not result.replayed
    own = routes_of(dispatched)
    assert (own != batch.routes).any()
    flips = np.sort(own, -1) != np.sort(batch.routes, -1)
    assert result.metrics["route/ref_dispatched_flip_frac"] == pytest.approx(flips.any(-1).mean())


def test_without_replay_the_trainer_decides_and_still_reports_agreement(
    spec, make_trainer, make_batch, dispatched
) -> None:
    batch = make_batch(spec, noise=0.5)
    replayed = make_trainer(spec, ONE_STEP).train_step(batch).metrics
    dispatched.clear()
    metrics = make_trainer(spec, replace(ONE_STEP, replay_routes=False)).train_step(batch).metrics
    assert (routes_of(dispatched) != batch.routes).any()
    assert metrics["route/replayed_rows_frac"] == 0.0
    assert metrics["route/flip_frac"] > 0.05
    assert metrics["route/dispatched_flip_frac"] == pytest.approx(metrics["route/flip_frac"])
    # Deeper layers see other inputs, the first MoE layer does not.
    assert metrics["route/flip_frac/layer_1"] == replayed["route/flip_frac/layer_1"]


def test_rows_without_a_route_are_decided(spec, make_trainer, make_batch, dispatched) -> None:
    batch = make_batch(spec, noise=0.5)
    routes = batch.routes.copy()
    routes[::3] = -1
    dispatched.clear()
    metrics = make_trainer(spec, ONE_STEP).train_step(batch.with_rows(routes=routes)).metrics
    used, known = routes_of(dispatched), routes[:, 0, 0] >= 0
    np.testing.assert_array_equal(used[known], batch.routes[known])
    assert (used >= 0).all()
    assert metrics["route/replayed_rows_frac"] == pytest.approx(known.mean())


@pytest.mark.parametrize("shift", ["row", "layer"])
def test_shifted_routes_show(shift, spec, make_trainer, make_batch, dispatched) -> None:
    batch = make_batch(spec, num_groups=8)
    right = make_trainer(spec, ONE_STEP).train_step(batch).metrics
    wrong_routes = np.roll(batch.routes, 1, axis=0 if shift == "row" else 1)
    dispatched.clear()
    wrong = make_trainer(spec, ONE_STEP).train_step(batch.with_rows(routes=wrong_routes)).metrics
    assert (routes_of(dispatched) != batch.routes).mean() > 0.3
    assert right["route/flip_frac"] == 0 and right["route/zero_overlap_frac"] == 0
    assert wrong["route/flip_frac"] > 0.5 and wrong["route/zero_overlap_frac"] > 0.1
    assert right["train/train_rollout_logprob_abs_diff"] < 1e-6
    assert wrong["train/train_rollout_logprob_abs_diff"] > 1e-3


def test_replay_keeps_the_gradient_of_the_router(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec, ONE_STEP)
    before = {n: p.detach().clone() for n, p in trainer.decoder.named_parameters() if n.endswith("router")}
    trainer.train_step(make_batch(spec, noise=0.5))
    after = dict(trainer.decoder.named_parameters())
    assert all((after[name] != weight).any() for name, weight in before.items())


def test_the_gap_without_replay_is_reported_next_to_the_gap_with_it(spec, make_trainer, make_batch) -> None:
    """Only the routers differ between engine and trainer, so most of the gap is routing flips."""
    batch = make_batch(spec, noise=0.05, num_groups=8)
    metrics = make_trainer(spec, TrainerSettings(probe_tokens=10_000)).train_step(batch).metrics
    gap = "train/train_rollout_logprob_abs_diff"
    assert 0 < metrics[gap] < metrics[f"{gap}_no_replay"]
    assert metrics["train/train_rollout_kl"] < metrics["train/train_rollout_kl_no_replay"]
    assert metrics["route/dispatched_flip_frac"] == 0 < metrics["route/dispatched_flip_frac_no_replay"]
    assert 0 < metrics["route/token_any_flip_frac_no_replay"] < 1
    layers = [metrics[f"route/flip_frac_no_replay/layer_{layer}"] for layer in spec.moe_layers]
    assert metrics["route/flip_frac_no_replay"] == pytest.approx(np.mean(layers))
    assert 2 * metrics[f"{gap}_flipped"] < metrics[f"{gap}_flipped_no_replay"], "the gap is in these tokens"


def test_the_gap_of_flipped_tokens_is_theirs_alone(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec, noise=0.05, num_groups=8)
    trainer = make_trainer(spec, replace(ONE_STEP, replay_routes=False))
    result = trainer.log_probs(batch)
    rows = torch.from_numpy(batch.routes).long()
    router = Router.decide(compared_with=rows)
    with torch.no_grad():
        trainer.decoder(
            torch.from_numpy(batch.tokens),
            torch.from_numpy(batch.positions),
            PackedAttention(torch.from_numpy(batch.cu_seqlens)),
            router,
        )
    gaps = np.abs(result.log_probs - batch.rollout_log_probs)[router.flipped_rows().numpy()]
    measured = result.metrics["train/train_rollout_logprob_abs_diff_flipped"]
    assert measured == pytest.approx(np.nanmean(gaps), rel=1e-4)
    assert measured > result.metrics["train/train_rollout_logprob_abs_diff"]


def test_the_probe_is_bounded(spec, make_trainer, make_batch, dispatched) -> None:
    batch = make_batch(spec, noise=0.05)
    dispatched.clear()
    make_trainer(spec, TrainerSettings(probe_tokens=20)).train_step(batch)
    assert len(dispatched) == 2 * len(spec.moe_layers)
    assert dispatched[0].shape[0] > 20 >= dispatched[-1].shape[0]


def test_where_no_row_flips_the_training_pass_knows_the_gap_without_replay(
    spec, make_trainer, make_batch, dispatched
) -> None:
    batch, settings = make_batch(spec), TrainerSettings(probe_tokens=60)
    apart = (batch.rollout_log_probs - 0.01 * batch.positions).astype(np.float32)
    batch = batch.with_rows(rollout_log_probs=apart)
    trainer = make_trainer(spec, settings)
    own = gap_without_replay(trainer.decoder, batch, settings, trainer.device)
    dispatched.clear()
    metrics = trainer.train_step(batch).metrics
    assert len(dispatched) == len(spec.moe_layers), "one pass"
    assert own and {name: metrics[name] for name in own} == pytest.approx(own, abs=1e-6)
    assert metrics["train/train_rollout_logprob_abs_diff_no_replay"] > 0


def test_the_probe_takes_sequences_of_the_newest_weights(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec, noise=0.05, num_groups=8)
    versions = np.where(batch.sequence_ids < 10, 3, 4)
    versions[batch.loss_mask == 0] = -1
    mixed = batch.with_rows(weight_versions=versions)
    newest = batch.select(range(10, batch.num_sequences))
    settings = TrainerSettings(probe_tokens=60)
    gap = "train/train_rollout_logprob_abs_diff_no_replay"
    measured = make_trainer(spec, settings).train_step(mixed).metrics[gap]
    assert measured == pytest.approx(make_trainer(spec, settings).train_step(newest).metrics[gap])
    assert measured != make_trainer(spec, settings).train_step(batch).metrics[gap]


def test_gaps_without_engine_log_probs_are_absent_not_zero(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec)
    blank = batch.with_rows(rollout_log_probs=np.full(batch.num_tokens, np.nan, np.float32))
    metrics = make_trainer(spec).train_step(blank).metrics
    assert not [name for name in metrics if "train_rollout" in name or name == "train/ratio_gt2_frac"]


def test_a_dense_model_reports_no_routing(dense_spec, make_trainer, make_batch) -> None:
    metrics = make_trainer(dense_spec).train_step(make_batch(dense_spec)).metrics
    assert not [name for name in metrics if name.startswith("route/") or name.endswith("_no_replay")]


@pytest.mark.parametrize("damage", ["expert", "layers"])
def test_routes_of_another_model_are_refused(damage, spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec)
    routes = batch.routes.copy()
    if damage == "expert":
        routes[3, 0, 0] = 6
    else:
        routes = routes[:, :1].copy()
    with pytest.raises(DataError, match="routes"):
        make_trainer(spec).train_step(batch.with_rows(routes=routes))
