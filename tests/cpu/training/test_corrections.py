"""Corrections for off-policy data in training steps: what they take out, and what they need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.algorithms.importance import ImportanceCorrection, mean_weight
from miles.algorithms.losses import PolicyLossSettings
from miles.algorithms.rejection import Rejection
from miles.algorithms.sequences import Sequences
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings

SETTINGS = TrainerSettings(optimizer=OptimizerSettings(lr=1e-3), probe_tokens=0)


def with_policy(**policy) -> TrainerSettings:
    return replace(SETTINGS, algorithm=AlgorithmSettings(policy=PolicyLossSettings(**policy)))


CASES = {
    "level": ({"correction": ImportanceCorrection(0.0, 1.0, level="sequence")}, "train/tis_clipfrac"),
    "icepop": ({"correction": ImportanceCorrection(0.99, 1.01, "mask")}, "train/tis_clipfrac"),
    "normalised": ({"correction": ImportanceCorrection(batch_normalize=True)}, "train/tis_scale"),
    "rejection": ({"rejection": Rejection("geometric", 0.99, 1.01)}, "train/rs_frac"),
    "veto": ({"rejection": Rejection("token", 0.0, 99.0, veto=0.9)}, "train/rs_veto_frac"),
}


@pytest.mark.parametrize(("policy", "metric"), CASES.values(), ids=CASES.keys())
def test_a_step_with_a_correction_differs_and_says_so(policy, metric, spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec, weights_seed=3)
    plain = make_trainer(spec, SETTINGS).train_step(batch).metrics
    corrected = make_trainer(spec, with_policy(**policy)).train_step(batch).metrics
    assert corrected[metric] > 0 and metric not in plain
    assert corrected["train/grad_norm"] != pytest.approx(plain["train/grad_norm"], rel=1e-3)


def test_measuring_the_mismatch_changes_no_bit(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec, weights_seed=3)
    measured = ImportanceCorrection(applied=False), Rejection(applied=False)
    policy = {"correction": measured[0], "rejection": measured[1], "mismatch_metrics": True}
    plain, watched = make_trainer(spec, SETTINGS), make_trainer(spec, with_policy(**policy))
    before, after = plain.train_step(batch).metrics, watched.train_step(batch).metrics
    assert after.keys() - before.keys() >= {"train/tis", "train/rs_frac", "train/mis_ppl_ratio"}
    assert after["train/mis_k3_kl"] > 0
    assert {name: after[name] for name in before if "perf/" not in name} == {
        name: value for name, value in before.items() if "perf/" not in name
    }
    other = dict(watched.named_weights())
    assert all(torch.equal(tensor, other[name]) for name, tensor in plain.named_weights())


def test_the_scale_is_that_of_the_whole_step_before_the_update(spec, make_trainer, make_batch) -> None:
    batch = make_batch(spec, weights_seed=3)
    correction = ImportanceCorrection(0.5, 1.5, level="geometric", batch_normalize=True)
    cut = replace(with_policy(correction=correction), micro_batch_size=1)
    trainer = make_trainer(spec, cut)
    ratio = trainer.log_probs(batch).log_probs - batch.rollout_log_probs
    expected = mean_weight(
        torch.from_numpy(np.nan_to_num(ratio)),
        torch.from_numpy(batch.loss_mask),
        Sequences(torch.from_numpy(batch.cu_seqlens)),
        correction,
    )
    assert trainer.train_step(batch).metrics["train/tis_scale"] == pytest.approx(expected, rel=1e-5)
