"""`miles convert` carries the optimizer's state under the weights' names: a run goes on from what it wrote,
on another number of ranks, with equal losses.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from miles.errors import CheckpointError
from miles.training.settings import OptimizerSettings, TrainerSettings
from miles.weights.convert import Wanted, convert, open_source, plan_conversion
from miles.weights.file_manifest import STEP_MANIFEST, file_manifest

PLAIN = TrainerSettings(optimizer=OptimizerSettings(lr=1e-3, weight_decay=0.1))


def convert_step(source: Path, target: Path, **wanted: object) -> Path:
    convert(plan_conversion(open_source(source), target, Wanted(**wanted)))  # type: ignore[arg-type]
    return target


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step of a run, to be filled by a trainer."""
    (tmp_path / "step-000002" / "trainer").mkdir(parents=True)
    (tmp_path / "step-000002" / "loop_state.json").write_text('{"step": 2}')
    return tmp_path / "step-000002"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_from_a_converted_step_on_two_ranks(
    dtype, spec, two_ranks, make_batch, step, tmp_path
) -> None:
    how = {"spec": spec, "settings": PLAIN, "dtype": dtype}
    batches = [make_batch(spec, seed=seed, noise=0.3) for seed in range(5)]
    straight = two_ranks.alone("train", batches=batches, **how)[0]
    two_ranks.alone("train", batches=batches[:2], save=step / "trainer", **how)
    there = convert_step(step, tmp_path / "dcp", layout="dcp")
    back = convert_step(there, tmp_path / "back", layout="native")
    for load in (back / "trainer", step / "trainer"):
        results = two_ranks("train", batches=batches[2:], load=load, **how)[0][0]
        for result, expected in zip(results, straight[2:], strict=True):
            tolerance = 1e-5 if dtype == "float32" else 2e-2
            assert result.metrics["train/loss"] == pytest.approx(
                expected.metrics["train/loss"], abs=tolerance
            )


def test_the_way_through_a_distributed_checkpoint_changes_no_byte(
    spec, make_trainer, make_batch, step, tmp_path
) -> None:
    trainer = make_trainer(spec, PLAIN, dtype=torch.bfloat16)
    trainer.train_step(make_batch(spec))
    trainer.save(step / "trainer")
    there = convert_step(step, tmp_path / "dcp", layout="dcp")
    state = {path.name for path in (there / "run_state").rglob("*") if path.is_file()}
    assert state == {"loop_state.json", "trainer_state.json"}
    back = convert_step(there, tmp_path / "back", layout="native")
    files = [path.relative_to(step) for path in step.rglob("*") if path.is_file()]
    assert Path("trainer/optimizer/master.safetensors") in files
    for file in files:
        if file.suffix == ".safetensors" or file.name in ("trainer_state.json", "loop_state.json"):
            assert (back / file).read_bytes() == (step / file).read_bytes(), file
    promised = json.loads((back / STEP_MANIFEST).read_text())
    (back / STEP_MANIFEST).unlink()
    (back / "miles_convert.json").unlink()
    assert promised == file_manifest(back)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_finds_the_moments_under_the_weights_names(
    spec, make_trainer, make_batch, step, tmp_path
) -> None:
    trainer = make_trainer(spec, PLAIN)
    trainer.train_step(make_batch(spec))
    trainer.save(step / "trainer")
    convert_step(step, tmp_path / "dcp", layout="dcp")
    for moment in ("exp_avg", "exp_avg_sq"):
        saved = load_file(step / "trainer" / "optimizer" / f"{moment}.safetensors")
        found = {f"optimizer.{moment}.{name}": torch.empty_like(tensor) for name, tensor in saved.items()}
        dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
        assert all(torch.equal(found[f"optimizer.{moment}.{name}"], saved[name]) for name in saved)
        assert saved["model.layers.1.mlp.gate.weight"].abs().sum() > 0


def test_without_an_optimizer(spec, make_trainer, step, tmp_path) -> None:
    make_trainer(spec, PLAIN).save(step / "trainer")
    plan = plan_conversion(open_source(step), tmp_path / "hf", Wanted())
    assert len(plan.left_out) == 2 * len(plan.moves)
    weights = convert_step(step, tmp_path / "dcp", layout="dcp", optimizer=False)
    assert not (weights / "run_state").exists()
    with pytest.raises(CheckpointError, match="dcp: it has no optimizer's state: a run cannot go on from it"):
        convert_step(weights, tmp_path / "native", layout="native")
