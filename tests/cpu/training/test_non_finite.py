"""A NaN is found, named, counted and never replaced; the step is skipped or the run asked to stop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.errors import MilesError
from miles.training.native.non_finite import find_non_finite
from miles.training.settings import FaultInjection, TrainerSettings

TENSOR = "model.layers.1.mlp.experts.3.up_proj.weight"
FAULTY = TrainerSettings(fault=FaultInjection("nan_grad", step=1, tensor=TENSOR))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_the_event_names_step_and_tensor(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec, FAULTY)
    results = [trainer.train_step(make_batch(spec, seed=seed)) for seed in range(3)]
    assert [len(result.events) for result in results] == [0, 1, 0]
    assert results[1].events[0] == {
        "kind": "non_finite",
        "step": 1,
        "policy": "skip",
        "what": "gradient",
        "tensor": TENSOR,
        "count": 1,
        "tensors": 1,
    }
    assert [result.metrics["train/step_skipped"] for result in results] == [0, 1, 0]
    assert results[1].metrics["train/non_finite_elements"] == 1
    assert np.isnan(results[1].metrics["train/grad_norm"])


def test_a_skipped_step_changes_nothing_but_the_counter(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec, FAULTY)
    trainer.train_step(make_batch(spec))
    before, moments = weights(trainer), trainer.optimizer.moments("exp_avg")
    moments_before = {name: tensor.clone() for name, tensor in moments.items()}
    result = trainer.train_step(make_batch(spec, seed=1))
    assert not result.stop
    assert same(before, weights(trainer))
    assert same(moments_before, trainer.optimizer.moments("exp_avg"))
    assert (trainer.step, trainer.state.updates) == (2, 1)
    trainer.train_step(make_batch(spec, seed=2))
    assert not same(before, weights(trainer))


def test_stop_ends_the_rollout_batch_and_says_so(spec, make_trainer, make_batch) -> None:
    settings = replace(FAULTY, non_finite_policy="stop", num_steps_per_rollout=4)
    result = make_trainer(spec, settings).train_step(make_batch(spec))
    assert result.stop
    assert len(result.optimizer_steps) == 2


def test_the_default_fault_hits_the_middle_layer(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec, TrainerSettings(fault=FaultInjection("nan_grad", step=0)))
    (event,) = trainer.train_step(make_batch(spec)).events
    assert event["tensor"] == "model.layers.1.input_layernorm.weight"


def test_an_unknown_tensor_is_the_users_mistake(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec, TrainerSettings(fault=FaultInjection("nan_grad", 0, "layers.9.nope")))
    with pytest.raises(MilesError, match="nope"):
        trainer.train_step(make_batch(spec))


def test_a_bad_advantage_is_named_before_the_gradients_it_spoils(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec)
    advantages = batch.loss_mask.copy()
    advantages[np.flatnonzero(batch.loss_mask)[4]] = np.inf
    trainer = make_trainer(spec)
    before = weights(trainer)
    (event,) = trainer.train_step(batch.with_rows(advantages=advantages)).events
    assert (event["what"], event["tensor"], event["count"]) == ("loss_input", "advantages", 1)
    assert same(before, weights(trainer))


def test_a_bad_weight_is_named_before_everything_else(spec, make_trainer, make_batch) -> None:
    trainer = make_trainer(spec)
    dict(trainer.named_weights())["model.layers.2.self_attn.k_proj.weight"][0, 0] = torch.nan
    (event,) = trainer.train_step(make_batch(spec)).events
    assert (event["what"], event["tensor"]) == ("weight", "model.layers.2.self_attn.k_proj.weight")


def test_finite_gradients_whose_norm_overflows_are_told_apart() -> None:
    event = find_non_finite(3, "skip", [], [], [("w", torch.full((2,), 3e38))], loss=0.1)
    assert (event["what"], event["tensor"]) == ("gradient_norm", None)
