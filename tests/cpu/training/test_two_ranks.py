"""Two ranks that share a model with FSDP2 train like one process, whatever their shares are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miles.algorithms.importance import ImportanceCorrection
from miles.algorithms.losses import PolicyLossSettings
from miles.algorithms.rejection import Rejection
from miles.arch import ArchSpec, LayerSpec, MoeSpec, RopeSpec, with_mtp
from miles.arch.spec import IndexerSpec, LatentSpec
from miles.data.batch import TrainBatch
from miles.training.settings import (
    AlgorithmSettings,
    CriticSettings,
    FaultInjection,
    OptimizerSettings,
    ScheduleSettings,
    TrainerSettings,
)
from miles.training.trainer import TrainResult
from miles.weights.safetensors_io import read_tensors

PLAIN = TrainerSettings(optimizer=OptimizerSettings(lr=1e-3, weight_decay=0.1))
POLICY = PolicyLossSettings(
    kl_loss_coef=0.1, kl_loss_type="k3", entropy_coef=0.01, correction=ImportanceCorrection(0.5, 1.05)
)
EVERY_TERM = AlgorithmSettings(
    use_kl_loss=True, policy=POLICY, calculate_per_token_loss=True, temperature=0.9
)
SEQUENCES = AlgorithmSettings(
    policy=PolicyLossSettings(
        correction=ImportanceCorrection(0.9, 1.02, level="sequence", batch_normalize=True),
        rejection=Rejection("geometric", 0.99, 1.01, veto=0.5),
        mismatch_metrics=True,
    )
)
REWARD_KL = AlgorithmSettings(advantage_estimator="reinforce_plus_plus", kl_coef=0.1)

Outcome = tuple[list[TrainResult], dict[str, torch.Tensor]]


def comparable(results: list[TrainResult]) -> list[dict[str, float]]:
    return [
        {name: value for name, value in result.metrics.items() if not name.startswith("perf/")}
        for result in results
    ]


def assert_equal(two: list[Outcome], one: Outcome, loss: float = 1e-5, weights: float = 2e-5) -> None:
    """Both ranks report the same, and what one process reports, step by step."""
    expected = comparable(one[0])
    assert comparable(two[1][0]) == comparable(two[0][0])
    for row, right in zip(comparable(two[0][0]), expected, strict=True):
        assert row["train/loss"] == pytest.approx(right["train/loss"], abs=loss, rel=0)
        assert row == pytest.approx(right, abs=max(loss, 1e-5), rel=1e-4)
    for rank in two:
        assert rank[1].keys() == one[1].keys()
        for name, tensor in rank[1].items():
            torch.testing.assert_close(tensor, one[1][name], atol=weights, rtol=0)


@pytest.fixture
def five(make_batch):
    """Five rollout batches whose engine has other routers than the trainer: replay matters."""

    def make(spec) -> list[TrainBatch]:
        return [make_batch(spec, seed=seed, noise=0.3) for seed in range(5)]

    return make


SLOW = pytest.mark.slow
QUICK = ("plain", "no_replay", "every_term")
"""What `make check` goes through; `make test` goes through all of them."""
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"settings": PLAIN},
    "no_replay": {"settings": replace(PLAIN, replay_routes=False)},
    "recompute": {"settings": replace(PLAIN, recompute_num_layers=3, max_tokens_per_micro_batch=30)},
    "two_steps": {"settings": replace(PLAIN, num_steps_per_rollout=2, max_tokens_per_micro_batch=20)},
    "single_sequences": {"settings": replace(PLAIN, micro_batch_size=1)},
    "every_term": {"settings": replace(PLAIN, algorithm=EVERY_TERM), "reference_seed": 4},
    "corrections": {"settings": replace(PLAIN, algorithm=SEQUENCES, max_tokens_per_micro_batch=30)},
    "reward_kl": {"settings": replace(PLAIN, algorithm=REWARD_KL, micro_batch_size=3), "reference_seed": 4},
}


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=SLOW) for way in WAYS])
def test_two_ranks_equal_one_over_five_steps(way, spec, two_ranks, five) -> None:
    how = {"spec": spec, "batches": five(spec), **WAYS[way]}
    one = two_ranks.alone("train", **how)
    assert_equal(two_ranks("train", **how), one)
    assert one[0][0].metrics["train/grad_norm"] > 0.01


def test_a_teacher_advises_both_ranks_as_one(spec, dense_spec, two_ranks, five) -> None:
    settings = replace(PLAIN, algorithm=AlgorithmSettings(opd_kl_coef=0.5), micro_batch_size=3)
    how = {"spec": spec, "batches": five(spec)[:2], "settings": settings, "teacher": dense_spec}
    one = two_ranks.alone("train", **how)
    assert_equal(two_ranks("train", **how), one)
    assert one[0][0].metrics["rollout/opd_reverse_kl"] != 0


def test_a_dense_model_too(dense_spec, two_ranks, five) -> None:
    how = {"spec": dense_spec, "batches": five(dense_spec), "settings": PLAIN}
    assert_equal(two_ranks("train", **how), two_ranks.alone("train", **how))


def test_an_untied_head_and_biases_too(dense_spec, two_ranks, make_batch) -> None:
    layers = tuple(
        replace(layer, attention=replace(layer.attention, qkv_bias=True)) for layer in dense_spec.layers
    )
    spec = replace(dense_spec, layers=layers, tie_word_embeddings=False)
    how = {"spec": spec, "batches": [make_batch(spec)] * 3, "settings": PLAIN}
    assert_equal(two_ranks("train", **how), two_ranks.alone("train", **how))


def sparse(spec: ArchSpec) -> ArchSpec:
    """Router biases and an indexer, which no rank trains; latent attention, shared experts, groups."""
    latent = LatentSpec(query_rank=10, kv_rank=8, plain_dim=6, rotated_dim=4, value_dim=5)
    attention = replace(
        spec.layers[0].attention,
        num_kv_heads=1,
        head_dim=12,
        qk_norm=False,
        rope=RopeSpec(1e4, width=4, interleaved=True),
        latent=latent,
        indexer=IndexerSpec(num_heads=7, head_dim=6, top_k=5),
    )
    moe = MoeSpec(6, 2, 16, True, "sigmoid", True, num_groups=3, top_groups=2, shared_size=16)
    layers = tuple(
        LayerSpec(attention, moe if isinstance(layer.mlp, MoeSpec) else layer.mlp) for layer in spec.layers
    )
    return replace(spec, family="deepseek_v32", layers=layers, tie_word_embeddings=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_frozen_is_whole_on_both_ranks(dtype: str, spec, two_ranks, make_batch) -> None:
    spec = sparse(spec)
    how = {"spec": spec, "batches": [make_batch(spec)] * 2, "settings": PLAIN, "dtype": dtype}
    two, one = two_ranks("train", **how), two_ranks.alone("train", **how)
    if dtype == "float32":
        assert_equal(two, one)
    for name, tensor in one[1].items():
        bias, indexer = name.endswith("e_score_correction_bias"), ".indexer." in name
        assert tensor.dtype == two[1][1][name].dtype == (torch.float32 if bias else getattr(torch, dtype))
        if bias or indexer:
            assert torch.equal(tensor, two[1][1][name]), name


def test_bf16_with_fp32_masters(spec, two_ranks, five) -> None:
    """Gradients of the two shares are rounded to bf16 separately, so less agrees than in fp32."""
    how = {"spec": spec, "batches": five(spec), "settings": PLAIN, "dtype": "bfloat16"}
    two, one = two_ranks("train", **how), two_ranks.alone("train", **how)
    for row, right in zip(comparable(two[0][0]), comparable(one[0]), strict=True):
        assert row["train/loss"] == pytest.approx(right["train/loss"], abs=2e-2)
        assert row["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=5e-2)
    assert {tensor.dtype for tensor in two[0][1].values()} == {torch.bfloat16}


def test_one_long_sequence_on_one_rank_and_many_short_ones_on_the_other(spec, two_ranks, make_batch) -> None:
    batch = make_batch(spec, num_groups=4, noise=0.3)
    order = np.argsort(-batch.lengths, kind="stable")
    uneven = batch.select([int(order[0]), *(int(i) for i in order[-4:])])
    uneven = replace(uneven, group_index=np.zeros(5, np.int64))
    how = {"spec": spec, "batches": [uneven] * 3, "settings": replace(PLAIN, micro_batch_size=1)}
    assert_equal(two_ranks("train", **how), two_ranks.alone("train", **how))


# One short sequence leaves gradients near zero; Adam takes little but their sign without a larger epsilon.
STEADY = replace(PLAIN, optimizer=OptimizerSettings(lr=1e-3, weight_decay=0.1, adam_eps=1e-5))


@pytest.mark.parametrize("settings", [STEADY, replace(STEADY, num_steps_per_rollout=2)])
def test_a_rank_without_a_sequence(settings, spec, two_ranks, make_batch) -> None:
    batch = make_batch(spec, noise=0.3)
    lonely = batch.with_rows(advantages=batch.loss_mask).select([2])
    how = {"spec": spec, "batches": [lonely] * 3, "settings": settings}
    assert_equal(two_ranks("train", **how), two_ranks.alone("train", **how))


@pytest.mark.parametrize("flat", [4, 12])
def test_groups_of_equal_rewards(flat, spec, two_ranks, make_batch) -> None:
    """Their sequences need no backward, on any rank; with nothing else there is none at all."""
    batch = make_batch(spec, noise=0.3)
    rewards = batch.rewards.copy()
    rewards[:flat] = 1.0
    batches = [make_batch(spec, seed=1), replace(batch, rewards=rewards), make_batch(spec, seed=2)]
    how = {"spec": spec, "batches": batches, "settings": replace(PLAIN, max_tokens_per_micro_batch=20)}
    assert_equal(two_ranks("train", **how), two_ranks.alone("train", **how))


def test_groups_that_share_a_prompt(spec, two_ranks, make_batch) -> None:
    """A prompt passes the model once per rank that has samples of it."""
    batches = [make_batch(spec, seed=seed, noise=0.3, one_prompt_per_group=True) for seed in range(3)]
    how = {"spec": spec, "batches": batches, "settings": replace(PLAIN, max_tokens_per_micro_batch=40)}
    assert_equal(two_ranks("train", **how), two_ranks.alone("train", **how))


def test_supervised_steps(spec, two_ranks, make_batch) -> None:
    settings = replace(PLAIN, algorithm=AlgorithmSettings(loss_type="sft_loss"))
    batches = [replace(make_batch(spec, seed=seed), routes=None) for seed in range(3)]
    how = {"spec": spec, "batches": batches, "settings": settings}
    assert_equal(two_ranks("train", **how), two_ranks.alone("train", **how))


@SLOW
def test_the_load_balancing_loss_reaches_both_ranks(spec, two_ranks, five) -> None:
    """A mean over micro-batches, which the shares change: near, not equal, unless one sequence is a batch."""
    settings = replace(PLAIN, moe_aux_loss_coeff=0.1, micro_batch_size=1)
    how = {"spec": spec, "batches": five(spec), "settings": settings}
    assert_equal(two_ranks("train", **how), two_ranks.alone("train", **how))


def test_log_probs_and_entropies_of_every_row(spec, two_ranks, make_batch) -> None:
    settings = replace(PLAIN, algorithm=AlgorithmSettings(observe_training_entropy=True), micro_batch_size=5)
    how = {"spec": spec, "batch": make_batch(spec, noise=0.3), "settings": settings}
    one = two_ranks.alone("log_probs", **how)
    for result in two_ranks("log_probs", **how):
        np.testing.assert_allclose(result.log_probs, one.log_probs, atol=1e-5)
        np.testing.assert_allclose(result.entropy, one.entropy, atol=1e-5)
        assert result.metrics == pytest.approx(one.metrics, abs=1e-5)


def test_knobs_and_schedule(spec, two_ranks, five) -> None:
    schedule = ScheduleSettings(lr_decay_style="cosine", lr_warmup_iters=2, lr_decay_iters=8)
    how = {
        "spec": spec,
        "batches": five(spec),
        "settings": replace(PLAIN, schedule=schedule),
        "knobs": {"lr": 5e-4, "entropy_coef": 0.02},
    }
    two = two_ranks("train", **how)
    assert_equal(two, two_ranks.alone("train", **how))
    assert two[0][0][-1].metrics["train/lr"] < 5e-4


TENSOR = "model.layers.1.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize("expert", [0, 5], ids=["first_rank", "second_rank"])
def test_a_nan_in_the_shard_of_one_rank_skips_the_step_on_both(expert, spec, two_ranks, five) -> None:
    fault = FaultInjection("nan_grad", step=1, tensor=TENSOR.format(expert))
    how = {"spec": spec, "batches": five(spec)[:3], "settings": replace(PLAIN, fault=fault)}
    two, one = two_ranks("train", **how), two_ranks.alone("train", **how)
    for results, _ in two:
        assert [result.events for result in results] == [result.events for result in one[0]]
        assert [result.metrics["train/step_skipped"] for result in results] == [0, 1, 0]
        assert results[1].events[0]["tensor"] == fault.tensor
    assert_equal([(results[2:], w) for results, w in two], (one[0][2:], one[1]))


@pytest.mark.parametrize("sequence", range(3))
def test_a_bad_advantage_in_the_share_of_one_rank_skips_the_step_on_both(
    sequence, spec, two_ranks, make_batch
) -> None:
    batch = make_batch(spec)
    advantages = batch.loss_mask.copy()
    row = batch.cu_seqlens[sequence + 1] - 1
    assert batch.loss_mask[row]
    advantages[row] = np.inf
    bad = batch.with_rows(advantages=advantages)
    how = {"spec": spec, "settings": replace(PLAIN, non_finite_policy="stop")}
    two = two_ranks("train", batches=[bad], **how)
    untouched = two_ranks.alone("train", batches=[], **how)[1]
    for (result,), weights in two:
        assert result.stop
        assert (result.events[0]["what"], result.events[0]["tensor"]) == ("loss_input", "advantages")
        assert all(torch.equal(weights[name], tensor) for name, tensor in untouched.items())


LAYOUTS = {"2_to_1": (True, False), "1_to_2": (False, True), "2_to_2": (True, True)}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumes_on_another_number_of_ranks(layout, dtype, spec, two_ranks, five, tmp_path) -> None:
    how = {"spec": spec, "settings": PLAIN, "dtype": dtype}
    batches = five(spec)
    before, after = (two_ranks if both else two_ranks.alone for both in LAYOUTS[layout])
    straight = two_ranks.alone("train", batches=batches, **how)
    before("train", batches=batches[:2], save=tmp_path, **how)
    resumed = after("train", batches=batches[2:], load=tmp_path, **how)
    results = resumed[0][0] if LAYOUTS[layout][1] else resumed[0]
    exact = dtype == "float32"
    for row, right in zip(comparable(results), comparable(straight[0][2:]), strict=True):
        assert row["train/loss"] == pytest.approx(right["train/loss"], abs=1e-5 if exact else 2e-2)
        assert row["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=1e-4 if exact else 5e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_do_not_depend_on_who_wrote_them(dtype, spec, two_ranks, make_batch, tmp_path) -> None:
    """Weights, moments and masters pass from one rank to two and back without a changed byte."""
    how = {"spec": spec, "settings": PLAIN, "dtype": dtype}
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    for directory in (first, second, third):
        directory.mkdir()
    two_ranks.alone("train", batches=[make_batch(spec)], save=first, **how)
    two_ranks("load_and_save", load=first, save=second, **how)
    two_ranks.alone("load_and_save", load=second, save=third, **how)
    files = contents(first)
    assert ("optimizer/master.safetensors" in files) == (dtype == "bfloat16")
    assert contents(second) == files
    assert contents(third) == files


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_disk_that_refuses_raises_where_it_is_written_and_blocks_nobody(
    spec, two_ranks, make_batch, tmp_path
) -> None:
    how = {"spec": spec, "settings": PLAIN, "batch": make_batch(spec)}
    missing = tmp_path / "file"
    missing.write_text("not a directory")
    (first, loss), (second, again) = two_ranks("refused_save", missing=missing, **how)
    assert first in ("CheckpointError", "NotADirectoryError") and second == "nothing"
    assert loss == again


def test_each_rank_holds_half_of_weights_and_moments(spec, two_ranks) -> None:
    (held, moments, yielded), (other, other_moments, nothing) = two_ranks(
        "elements_held", spec=spec, settings=PLAIN
    )
    total = spec.num_parameters()
    assert held + other == moments + other_moments == total
    assert held == pytest.approx(total / 2, rel=0.05)
    assert yielded > 0 and nothing == 0


@pytest.mark.parametrize("kind", ["reward", "knob"])
def test_ranks_that_were_told_different_things_refuse_instead_of_hanging(
    kind, spec, two_ranks, make_batch
) -> None:
    how = {"spec": spec, "settings": PLAIN, "batch": make_batch(spec), "kind": kind}
    for error, message in two_ranks("other_input", **how):
        assert error == "RunError" and "[1]" in message


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux' socket table")
def test_the_ranks_listen_on_loopback_only(two_ranks) -> None:
    for addresses in two_ranks("listening_addresses"):
        assert addresses and set(addresses) == {"0100007F"}


MTP = {
    "plain": replace(PLAIN, train_mtp=True),
    "single_sequences": replace(PLAIN, train_mtp=True, micro_batch_size=1),
    "unrolled": replace(PLAIN, train_mtp=True, mtp_training_steps=4, recompute_num_layers=3),
}


@pytest.mark.parametrize("way", ["plain", *(pytest.param(way, marks=SLOW) for way in MTP if way != "plain")])
def test_two_ranks_train_the_draft_like_one(way, spec, two_ranks, five, tmp_path: Path) -> None:
    """Two MTP layers, and the checkpoint that both ways leave."""
    batches = five(spec)[:3]
    how = {"spec": with_mtp(spec, 2), "batches": batches, "settings": MTP[way], "save": tmp_path / "one"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = two_ranks.alone("train", **how)
    two = two_ranks("train", **{**how, "save": tmp_path / "two"})
    assert_equal(two, one)
    assert "train/mtp_accuracy/depth_2" in one[0][0].metrics
    assert any(name.startswith("mtp.layers.1.") for name in one[1])
    for file in ("model/model.safetensors", "optimizer/exp_avg.safetensors"):
        ours, theirs = (dict(read_tensors(tmp_path / name / file)) for name in ("one", "two"))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-5, rtol=0)


def test_two_ranks_train_a_critic_like_one_and_go_on_alone(spec, two_ranks, five, tmp_path: Path) -> None:
    """Its head of one row lies on the first rank alone."""
    settings = replace(
        PLAIN,
        algorithm=AlgorithmSettings(advantage_estimator="ppo", lambd=0.95),
        critic=CriticSettings(lr=2e-3),
        micro_batch_size=5,
    )
    how, batches = {"spec": spec, "settings": settings}, five(spec)[:4]
    one = two_ranks.alone("train", batches=batches, **how)
    two = two_ranks("train", batches=batches, **how)
    assert_equal(two, one)
    two_ranks("train", batches=batches[:2], save=tmp_path, **how)
    alone = two_ranks.alone("train", batches=batches[2:], load=tmp_path, **how)
    for results in (two[0][0][2:], alone[0]):
        for row, right in zip(comparable(results), comparable(one[0][2:]), strict=True):
            assert row["train/value_loss"] == pytest.approx(right["train/value_loss"], abs=1e-5)
            assert row["train/critic_grad_norm"] == pytest.approx(right["train/critic_grad_norm"], rel=1e-4)
            assert row["rollout/values"] == pytest.approx(right["rollout/values"], abs=1e-5) != 0
