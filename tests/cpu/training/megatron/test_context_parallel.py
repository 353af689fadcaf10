"""Sequences cut over context-parallel ranks: in Megatron's order, and trained as one process trains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from miles.algorithms.losses import PolicyLossSettings
from miles.arch import ArchSpec
from miles.training.megatron.context_parallel import PADDING, ContextSplit
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.options import MegatronOptions
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings
from tests.cpu.training.megatron.test_families import family_spec

LENGTHS = (1, 5, 8, 13)


def chunks_of(length: int, first_row: int, size: int) -> torch.Tensor:
    """[2 C, c]: rows of one sequence, as Megatron's `get_batch_on_this_cp_rank` views them."""
    padded = -(-length // (2 * size)) * 2 * size
    rows = torch.arange(first_row, first_row + padded)
    rows[length:] = PADDING
    return rows.view(2 * size, -1)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_has_one_early_and_one_late_chunk_of_every_sequence(size: int) -> None:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    chunks = [chunks_of(n, int(cu_seqlens[i]), size) for i, n in enumerate(LENGTHS)]
    for rank in range(size):
        split = ContextSplit(cu_seqlens, size, rank)
        expected = torch.cat([c[[rank, 2 * size - 1 - rank]].flatten() for c in chunks])
        assert split.rows_of(rank).tolist() == expected.tolist()
        starts = torch.repeat_interleave(cu_seqlens[:-1], torch.tensor([c[:2].numel() for c in chunks]))
        true = expected != PADDING
        assert (split.positions[true] == (expected - starts)[true]).all()
        assert not (split.cu_seqlens.diff() % (2 * size)).any()


def test_rows_go_out_and_come_back() -> None:
    cu_seqlens, values = torch.tensor([0, *LENGTHS]).cumsum(0), torch.randn(sum(LENGTHS), 3)
    splits = [ContextSplit(cu_seqlens, 2, rank, unit=3) for rank in range(2)]
    parts = [split.own(values, padding=-1) for split in splits]
    assert len(parts[0]) == len(parts[1]) and len(parts[0]) % 6 == 0
    assert torch.equal(splits[0].whole(parts), values)
    wanted = torch.tensor([0, 7, 7, 20])
    found = torch.zeros(4, 3)
    for split, part in zip(splits, parts, strict=True):
        mine, places = split.places(wanted)
        found[mine] += part[places]
    assert torch.equal(found, values[wanted])


SETTINGS = TrainerSettings(
    optimizer=OptimizerSettings(lr=2e-3),
    algorithm=AlgorithmSettings(policy=PolicyLossSettings(entropy_coef=0.05)),
    max_tokens_per_micro_batch=40,
    num_steps_per_rollout=2,
)
DEALT_OUT = MegatronOptions(distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
CASES = {
    "experts, R3": ("moe", MegatronLayout(cp=2), SETTINGS),
    "experts over the same ranks, recomputed, distributed optimizer": (
        "moe",
        MegatronLayout(cp=2, ep=2, options=DEALT_OUT),
        replace(SETTINGS, recompute_num_layers=3),
    ),
    "dense": ("dense", MegatronLayout(cp=2), SETTINGS),
    "windows and soft caps": ("windows", MegatronLayout(cp=2), SETTINGS),
    "chunks, and queries that grow with their position": ("chunks", MegatronLayout(cp=2), SETTINGS),
    "latent attention": ("latent", MegatronLayout(cp=2), SETTINGS),
}
FOUR = {
    "with TP2 and sequence parallelism": ("moe", MegatronLayout(cp=2, tp=2, ep=2, sequence_parallel=True)),
    "in a pipeline": ("moe", MegatronLayout(cp=2, pp=2, first_stage_layers=1)),
}


@pytest.fixture(scope="module")
def outcomes(
    world: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    spec: ArchSpec,
    dense_spec: ArchSpec,
    make_batches: Any,
) -> dict[str, Any]:
    """Results of rank 0 and of the last one by case, and of one process by model; two steps of four ranks."""
    root = tmp_path_factory.mktemp("context")
    latent = family_spec("deepseek_v3", num_nextn_predict_layers=0)
    specs = {"moe": spec, "dense": dense_spec, "latent": latent, "windows": family_spec("gemma2")}
    specs["chunks"] = family_spec("llama4_text")
    how = {name: {"spec": one, "batches": make_batches(one, 5)} for name, one in specs.items()}
    two = {
        name: ("train", how[model] | {"layout": layout, "settings": settings})
        for name, (model, layout, settings) in CASES.items()
    }
    four = {
        name: (
            "train",
            {
                "spec": specs[model],
                "batches": how[model]["batches"][:2],
                "layout": layout,
                "settings": SETTINGS,
            },
        )
        for name, (model, layout) in FOUR.items()
    }
    alone = {
        f"one process, {name}": ("train", each | {"layout": MegatronLayout(), "settings": SETTINGS})
        for name, each in how.items()
    }
    results = {}
    for size, cases in ((2, two), (4, four)):
        ranks = world(size, root / str(size), cases)
        results |= {name: (ranks[0][name], ranks[-1][name]) for name in cases}
    return results | world(1, root / "1", alone)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *FOUR])
def test_shared_sequences_train_what_one_process_trains(case: str, outcomes: dict[str, Any]) -> None:
    (first, weights), (last, _) = outcomes[case]
    expected, alone = outcomes[f"one process, {(CASES | FOUR)[case][0]}"]
    assert first == last
    for step, (row, right) in enumerate(zip(first, expected, strict=case in CASES)):
        assert abs(row["train/loss"]) > 1e-3
        assert row["train/loss"] == pytest.approx(right["train/loss"], abs=1e-4), step
        assert row["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=1e-3), step
        assert row == pytest.approx(right, rel=1e-3, abs=1e-4), step
    for name, tensor in weights.items() if case in CASES else ():
        assert (tensor - alone[name]).abs().mean() <= 1e-5, name
