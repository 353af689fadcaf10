"""A trainer that was saved and loaded goes on with the same bits, and its files are what they claim to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from miles.errors import CheckpointError
from miles.training.settings import OptimizerSettings, ScheduleSettings, TrainerSettings

SETTINGS = TrainerSettings(
    optimizer=OptimizerSettings(lr=3e-3, weight_decay=0.1),
    schedule=ScheduleSettings(lr_decay_style="cosine", lr_warmup_iters=2, lr_decay_iters=8, min_lr=1e-4),
    probe_tokens=0,
)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.named_weights()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_steps_save_load_three_steps_equal_six(dtype, spec, make_trainer, make_batch, tmp_path) -> None:
    batches = [make_batch(spec, seed=seed) for seed in range(6)]
    straight = make_trainer(spec, SETTINGS, dtype=dtype)
    rows = [straight.train_step(batch).metrics for batch in batches]

    first = make_trainer(spec, SETTINGS, dtype=dtype)
    for batch in batches[:3]:
        first.train_step(batch)
    first.save(tmp_path)
    second = make_trainer(spec, SETTINGS, seed=5, dtype=dtype)
    second.load(tmp_path)
    assert second.step == 3
    assert [second.train_step(batch).metrics for batch in batches[3:]] == rows[3:]
    assert_same_bits(weights(second), weights(straight))
    assert (weights(second)["model.embed_tokens.weight"] != weights(first)["model.embed_tokens.weight"]).any()


def test_knobs_come_back(spec, make_trainer, make_batch, tmp_path) -> None:
    trainer = make_trainer(spec, SETTINGS)
    trainer.set("lr", 1e-2)
    trainer.set("entropy_coef", 0.01)
    trainer.set("tis_clip", 3.0)
    trainer.save(tmp_path)
    restored = make_trainer(spec, SETTINGS)
    restored.load(tmp_path)
    assert restored.knobs() == trainer.knobs()
    assert restored.train_step(make_batch(spec)).metrics == trainer.train_step(make_batch(spec)).metrics


def test_moments_travel_under_published_names(spec, make_trainer, make_batch, tmp_path) -> None:
    trainer = make_trainer(spec, SETTINGS)
    trainer.train_step(make_batch(spec))
    trainer.save(tmp_path)
    published = dict(trainer.named_weights())
    for moment in ("exp_avg", "exp_avg_sq"):
        saved = load_file(tmp_path / "optimizer" / f"{moment}.safetensors")
        assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in published.items()}
        assert saved["model.layers.1.mlp.gate.weight"].abs().sum() > 0


def test_the_model_directory_loads_in_transformers(spec, make_trainer, make_batch, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(spec, SETTINGS)
    batch = make_batch(spec)
    trainer.train_step(batch)
    trainer.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = trainer.log_probs(replace(batch, routes=None)).log_probs
    end = batch.cu_seqlens[1]
    tokens = torch.from_numpy(batch.tokens[:end]).unsqueeze(0)
    with torch.no_grad():
        theirs = torch.log_softmax(model(tokens).logits[0], -1)
    for row in range(end):
        if batch.loss_mask[row]:
            assert ours[row] == pytest.approx(theirs[row, batch.targets[row]].item(), abs=1e-4)


def test_a_checkpoint_without_moments_cannot_be_resumed(spec, make_trainer, tmp_path) -> None:
    trainer = make_trainer(spec, SETTINGS)
    trainer.save(tmp_path, optimizer=False)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        trainer.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "optimizer/exp_avg.safetensors", "trainer_state.json"]
)
def test_a_damaged_part_is_refused_by_name(name, spec, make_trainer, tmp_path) -> None:
    make_trainer(spec, SETTINGS).save(tmp_path)
    path: Path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=path.name):
        make_trainer(spec, SETTINGS).load(tmp_path)
