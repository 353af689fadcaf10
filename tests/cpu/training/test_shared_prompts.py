"""A prompt that several samples begin with passes the model once, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miles.data.batch import TrainBatch
from miles.models import segment_attention
from miles.training.native import shared_prompts, update
from miles.training.native import trainer as trainer_module
from miles.training.native.micro_batches import cut_micro_batches
from miles.training.native.shared_prompts import find_shared_prompts
from miles.training.settings import TrainerSettings


def everyone(batch: TrainBatch) -> np.ndarray:
    return np.arange(batch.num_sequences)


def test_one_step_gives_the_same_metrics_and_weights(spec, make_trainer, make_batch, monkeypatch) -> None:
    batch = make_batch(spec, noise=0.3, num_groups=5, one_prompt_per_group=True)
    saved = batch.num_tokens - len(find_shared_prompts(batch, everyone(batch)).rows_T)
    assert saved > batch.num_tokens / 5
    shared, packed = make_trainer(spec), make_trainer(spec)
    of_shared = shared.train_step(batch).metrics
    for module in (trainer_module, update):
        monkeypatch.setattr(module, "may_share_prompts", lambda *_: False)
    of_packed = packed.train_step(batch).metrics
    assert of_shared == pytest.approx(of_packed, abs=1e-5)
    for name, weight in packed.decoder.named_parameters():
        torch.testing.assert_close(
            shared.decoder.get_parameter(name),
            weight,
            atol=1e-7,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_log_probs_of_a_pass_are_the_same(spec, make_trainer, make_batch, monkeypatch) -> None:
    batch = make_batch(spec, noise=0.3, one_prompt_per_group=True)
    trainer = make_trainer(spec)
    of_shared = trainer.log_probs(batch)
    monkeypatch.setattr(trainer_module, "may_share_prompts", lambda *_: False)
    of_packed = trainer.log_probs(batch)
    np.testing.assert_allclose(of_shared.log_probs, of_packed.log_probs, atol=2e-6)
    assert of_shared.metrics == pytest.approx(of_packed.metrics, abs=1e-5)


def test_every_packed_row_is_found_again(spec, make_batch) -> None:
    batch = make_batch(spec, num_groups=4, one_prompt_per_group=True)
    order = np.random.default_rng(0).permutation(batch.num_sequences)
    found = find_shared_prompts(batch, order)
    packed = np.concatenate([np.arange(batch.cu_seqlens[n], batch.cu_seqlens[n + 1]) for n in order])
    stands_for = found.rows_T[found.row_of_packed]
    for name in ("tokens", "positions", "routes"):
        values = getattr(batch, name)
        np.testing.assert_array_equal(values[stands_for], values[packed])
    # Targets differ only where a prompt ends: there one row predicts the first token of every sibling.
    own = batch.loss_mask[packed] == 0
    assert (batch.targets[stands_for] == batch.targets[packed])[
        own & (batch.loss_mask[stands_for] == 0)
    ].all()


def test_siblings_that_differ_are_not_shared(spec, make_batch) -> None:
    batch = make_batch(spec, num_groups=2, one_prompt_per_group=True)
    whole = len(find_shared_prompts(batch, everyone(batch)).rows_T)
    prompt = int(batch.lengths[1] + 1 - batch.response_lengths[1])
    row = batch.cu_seqlens[1]
    tokens, routes = batch.tokens.copy(), batch.routes.copy()
    tokens[row] = (tokens[row] + 1) % 29
    routes[row, 0] = (routes[row, 0] + 1) % 6
    for changed in (replace(batch, tokens=tokens), replace(batch, routes=routes)):
        found = find_shared_prompts(changed, everyone(changed))
        assert len(found.rows_T) == whole + prompt
    alone = replace(batch, group_index=np.full(batch.num_sequences, -1))
    assert find_shared_prompts(alone, everyone(alone)) is None


def test_long_sequences_are_shared_where_scores_never_exist_as_a_whole(spec, make_batch, monkeypatch) -> None:
    batch = make_batch(spec, one_prompt_per_group=True)
    monkeypatch.setattr(shared_prompts, "EXPLICIT_MAX_LEN", int(batch.lengths.max()) - 1)
    assert find_shared_prompts(batch, everyone(batch), torch.device("cpu")) is not None
    assert find_shared_prompts(batch, everyone(batch), torch.device("cuda")) is None


def test_a_token_budget_counts_a_prompt_once(spec, make_batch) -> None:
    batch = make_batch(spec, num_groups=6, one_prompt_per_group=True)
    budget = 40
    settings = TrainerSettings(max_tokens_per_micro_batch=budget)
    cut = cut_micro_batches(batch, everyone(batch), settings, share_prompts=True)
    assert all(len(micro_batch.rows_T) <= budget for micro_batch in cut)
    assert any(micro_batch.num_packed_rows > budget for micro_batch in cut)
    trained = np.sort(np.concatenate([micro_batch.trained_rows for micro_batch in cut]))
    np.testing.assert_array_equal(trained, np.flatnonzero(batch.loss_mask))


@pytest.mark.parametrize("attention", ["segments", "explicit"])
def test_micro_batches_within_a_budget_change_nothing(
    attention: str, spec, make_trainer, make_batch, monkeypatch
) -> None:
    monkeypatch.setattr(segment_attention, "SHORT", 0 if attention == "segments" else 1000)
    batch = make_batch(spec, noise=0.3, num_groups=5, one_prompt_per_group=True)
    whole, cut = make_trainer(spec), make_trainer(spec, TrainerSettings(max_tokens_per_micro_batch=40))
    of_whole, of_cut = whole.train_step(batch).metrics, cut.train_step(batch).metrics
    assert of_cut == pytest.approx(of_whole, abs=1e-5)
    for name, weight in whole.decoder.named_parameters():
        torch.testing.assert_close(cut.decoder.get_parameter(name), weight, atol=1e-7, rtol=1e-4)
