"""The memory of a GPU by hand, and against figures that others published."""

from __future__ import annotations

from dataclasses import replace

import pytest

from miles.arch.specs import shipped_spec
from miles.planning.engine_memory import plan_engine
from miles.planning.formats import bytes_per_weight
from miles.planning.hardware import GIB, gpu_kinds
from miles.planning.layout import Layout
from miles.planning.model_shape import model_shape
from miles.planning.phases import PROCESS_BYTES, Workload, host_parts, plan_phases
from miles.planning.trainer_memory import (
    RankWeights,
    TrainerNumerics,
    logits,
    rank_weights,
    rounded_weights,
    state_parts,
    training_activations,
)

MOE = model_shape(shipped_spec("qwen3-30b-a3b"))
SMALL = model_shape(shipped_spec("qwen3-0.6b"))
BF16 = TrainerNumerics("bf16")
H100 = gpu_kinds()["H100"].memory_bytes


def by_name(parts) -> dict[str, int]:  # type: ignore[no-untyped-def]
    return {part.name: part.bytes for part in parts}


@pytest.mark.parametrize("name", ["qwen3-0.6b", "qwen3-8b", "qwen3-235b-a22b"])
def test_the_groups_of_a_model_add_up(name: str) -> None:
    spec = shipped_spec(name)
    assert model_shape(spec).total == spec.num_parameters()


def test_one_rank_holds_the_whole_model() -> None:
    weights = rank_weights(MOE, Layout(world=1), stage=0)
    assert weights.total == 30_532_122_624
    assert weights.experts == 48 * 128 * 3 * 2048 * 768


def test_ranks_together_hold_the_model_and_what_they_repeat() -> None:
    """Embedding and head once, norms and routers on each tensor-parallel rank."""
    layout = Layout(world=8, tp=2, pp=4, ep=2, sequence_parallel=True)
    dense = 2 * sum(rank_weights(MOE, layout, stage).dense for stage in range(4))
    experts = 2 * sum(rank_weights(MOE, layout, stage).experts for stage in range(4))
    assert experts == MOE.experts
    assert dense == MOE.total - MOE.experts + MOE.router + MOE.small


def test_a_tied_head_is_stored_again_on_the_last_stage() -> None:
    one = rank_weights(SMALL, Layout(world=1), 0).total
    two = sum(rank_weights(SMALL, Layout(world=2, pp=2), stage).total for stage in (0, 1))
    assert two - one == SMALL.embedding


def test_key_value_heads_are_repeated_beyond_their_number() -> None:
    at = {tp: rank_weights(MOE, Layout(world=tp, tp=tp, etp=tp), 0) for tp in (4, 8)}
    repeated = MOE.key_value // 4
    assert at[8].dense - (at[4].dense - repeated - MOE.router - MOE.small) // 2 == pytest.approx(
        repeated + MOE.router + MOE.small, abs=8
    )


def test_sixteen_bytes_per_parameter() -> None:
    """bf16 weights and gradients, fp32 master and moments: 14B over TP 4 was reported as 56 GB of 80."""
    model = model_shape(shipped_spec("qwen3-14b"))
    layout = Layout(world=4, tp=4, sequence_parallel=True)
    parts = state_parts(rank_weights(model, layout, 0), layout, replace(BF16, fp32_gradients=False))
    assert sum(part.bytes for part in parts) / GIB == pytest.approx(56, rel=0.03)


def test_optimizer_is_sharded_over_data_parallel_ranks() -> None:
    layout, weights = Layout(world=8, ep=2), RankWeights(dense=800, experts=400, quantised=1000)
    assert by_name(state_parts(weights, layout, BF16))["optimizer"] == 12 * (800 // 8 + 400 // 4)
    whole = replace(BF16, distributed_optimizer=False)
    assert by_name(state_parts(weights, layout, whole))["optimizer"] == 12 * 1200
    host = replace(BF16, optimizer_on_host=True)
    assert by_name(state_parts(weights, layout, host))["optimizer"] == 0


def test_fp8_copies_of_matrix_products() -> None:
    weights, layout = RankWeights(dense=800, experts=400, quantised=1000), Layout(world=1)
    assert by_name(state_parts(weights, layout, replace(BF16, fp8=True)))["FP8 weights"] == 2 * 1000
    gathered = by_name(state_parts(weights, layout, replace(BF16, fp8=True, fp8_param_gather=True)))
    assert (gathered["weights"], gathered["FP8 weights"]) == (1000 + 200 * 2, 1000)


def test_recompute_keeps_inputs_and_one_layer() -> None:
    layout, width = Layout(world=1), 4 * 1024 + SMALL.attention_width + SMALL.mlp_width
    kept = training_activations(SMALL, layout, BF16, 0, tokens=100)
    assert kept.bytes == 100 * 28 * width * 2
    full = replace(BF16, recompute="full", recompute_method="uniform")
    assert training_activations(SMALL, layout, full, 0, 100).bytes == 100 * (28 * 1024 + width) * 2
    some = replace(full, recompute_method="block", recompute_num_layers=20)
    assert training_activations(SMALL, layout, some, 0, 100).bytes == 100 * (20 * 1024 + 9 * width) * 2


def test_early_stages_hold_more_micro_batches() -> None:
    layout = Layout(world=4, pp=4)
    sizes = [training_activations(SMALL, layout, BF16, stage, 100).bytes for stage in range(4)]
    assert sizes == [4 * sizes[3], 3 * sizes[3], 2 * sizes[3], sizes[3]]


def test_logits_are_cut_by_tensor_parallelism_and_by_chunks() -> None:
    layout = Layout(world=4, tp=4, sequence_parallel=True)
    assert logits(MOE, layout, BF16, tokens=1000, backward=True).bytes == 151_936 // 4 * 1000 * (2 + 8)
    chunked = replace(BF16, log_probs_chunk_tokens=100)
    assert logits(MOE, layout, chunked, 1000, True).bytes == 151_936 // 4 * (1000 * 4 + 100 * 8)


def engine(fraction: float = 0.6, **changes):  # type: ignore[no-untyped-def]
    settings = {
        "gpus": 8, "gpu_bytes": H100, "static_fraction": fraction, "weight_format": "fp8", "plain": "bf16",
        "int4_group_size": 32, "kv_bytes": 2,
    }  # fmt: skip
    return plan_engine(MOE, **(settings | changes))


def test_kv_cache_is_what_the_static_share_leaves() -> None:
    plan = engine()
    # 4 key-value heads over 8 GPUs: one on each; 48 layers, keys and values of 128 numbers in bf16.
    assert plan.kv_token_bytes == 48 * 2 * 1 * 128 * 2
    assert plan.cache_bytes == int(H100 * 0.6) - plan.weight_bytes
    assert engine(kv_bytes=1).kv_token_bytes == plan.kv_token_bytes // 2
    assert engine(gpus=2).kv_token_bytes == 2 * plan.kv_token_bytes


def test_a_draft_of_mtp_layers_takes_its_part_of_the_static_share() -> None:
    plain, plan = engine(), engine(draft_layers=2, draft_parameters=MOE.total // 10)
    assert plan.draft_bytes == pytest.approx(plain.weight_bytes / 10, rel=1e-6)
    assert plan.draft_token_bytes == 2 * plain.kv_token_bytes // 48
    assert plan.cache_tokens == plan.cache_bytes // (plain.kv_token_bytes * 50 // 48)
    parts = by_name(plan.parts(10_000))
    assert list(parts) == ["engine weights", "draft weights", "KV cache", "draft cache"]
    assert sum(parts.values()) == plan.static_bytes
    assert parts["draft cache"] == plan.cache_tokens * plan.draft_token_bytes


def test_int4_qat_keeps_the_rounded_experts_of_every_micro_batch_in_flight() -> None:
    layout = Layout(world=4, pp=4)
    qat = replace(BF16, int4_qat=True)
    experts = [rank_weights(MOE, layout, stage).experts for stage in range(4)]

    def rounded(numerics: TrainerNumerics, stage: int) -> int:
        return sum(part.bytes for part in rounded_weights(MOE, layout, numerics, stage))

    assert [rounded(qat, stage) for stage in range(4)] == [experts[i] * 2 * (4 - i) for i in range(4)]
    again = replace(qat, recompute="full", recompute_num_layers=3)
    assert rounded(again, 0) == experts[0] * 3 // 12 * 2, "12 layers a stage, three at a time"
    assert rounded(BF16, 0) == 0
    (one,) = rounded_weights(MOE, layout, qat, 0, backward=False)
    assert one.bytes == experts[0] // 12 * 2, "nothing is kept without a backward"
    assert SMALL.experts == 0
    (dense,) = rounded_weights(SMALL, Layout(world=1), qat, 0)
    assert dense.bytes == SMALL.linear * 2
    training = next(p for p in plan_phases(MOE, LAYOUT, work(numerics=qat)) if p.name == "training")
    assert "rounded weights" in by_name(training.parts)


def test_weights_that_exceed_the_static_share_leave_no_cache() -> None:
    plan = engine(fraction=0.1, gpus=1, weight_format="bf16")
    assert plan.cache_bytes < 0
    assert plan.cache_tokens == 0


def test_formats_of_a_whole_model() -> None:
    assert MOE.stored_bytes("bf16") == 2 * MOE.total
    assert MOE.stored_bytes("fp8") == pytest.approx(
        MOE.linear * 1.0002 + 2 * (MOE.total - MOE.linear), rel=1e-3
    )
    int4 = MOE.stored_bytes("int4", int4_group_size=128)
    assert int4 == pytest.approx(MOE.experts * (0.5 + 2 / 128) + 2 * (MOE.total - MOE.experts), rel=1e-6)
    assert bytes_per_weight("nvfp4") == 0.5625
    assert bytes_per_weight("mxfp8") == 1.03125


def work(**changes) -> Workload:  # type: ignore[no-untyped-def]
    usual = Workload(
        numerics=BF16, engine=engine(), max_context_len=10_000, train_tokens=1000, log_prob_tokens=2000,
        replay=True, colocate=True, offload_train=True, offload_rollout=True, bucket_bytes=2**29,
    )  # fmt: skip
    return replace(usual, **changes)


LAYOUT = Layout(world=16, tp=4, ep=8, sequence_parallel=True)


def test_colocated_phases_take_turns() -> None:
    phases = {phase.name: by_name(phase.parts) for phase in plan_phases(MOE, LAYOUT, work())}
    assert list(phases) == ["rollout", "log-probs", "training", "weight sync"]
    assert "optimizer" not in phases["rollout"], "given back"
    assert "KV cache" not in phases["training"], "given back"
    assert phases["training"]["engine process"] == PROCESS_BYTES
    assert {"weights", "engine weights", "buckets"} <= phases["weight sync"].keys()


def test_without_offload_both_sides_stay() -> None:
    stay = work(offload_train=False, offload_rollout=False)
    phases = {phase.name: by_name(phase.parts) for phase in plan_phases(MOE, LAYOUT, stay)}
    assert "optimizer" in phases["rollout"]
    assert "KV cache" in phases["training"]


def test_disaggregated_sides_do_not_share_a_gpu() -> None:
    apart = plan_phases(MOE, LAYOUT, work(colocate=False, offload_train=False))
    assert [phase.role for phase in apart] == ["engine GPU", "trainer GPU", "trainer GPU", "trainer GPU"]
    assert not any("engine" in part.name for phase in apart[1:] for part in phase.parts)


def test_a_critic_is_held_wherever_the_trainer_is_whole() -> None:
    critic = model_shape(shipped_spec("qwen3-30b-a3b").critic)
    assert critic.head == critic.hidden_size and critic.small == MOE.small
    own = rank_weights(critic, LAYOUT, 0)
    for stays in (False, True):
        where = work(critic=critic, offload_train=not stays)
        phases = {phase.name: by_name(phase.parts) for phase in plan_phases(MOE, LAYOUT, where)}
        held = {name for name, parts in phases.items() if "critic" in parts}
        assert held == {"log-probs", "training"} | ({"rollout", "weight sync"} if stays else set())
        assert phases["training"]["critic"] == own.total * (2 + 4) + 12 * (own.dense // 4 + own.experts // 2)


def test_the_fullest_stage_stands_for_all() -> None:
    layout = Layout(world=16, pp=4, ep=4)
    recomputed = replace(BF16, recompute="full", recompute_method="uniform")
    for numerics, last in ((BF16, False), (recomputed, True)):
        phases = plan_phases(MOE, layout, work(numerics=numerics))
        training = next(phase for phase in phases if phase.name == "training")
        assert ("logits" in by_name(training.parts)) is last


def test_host_memory_of_a_node() -> None:
    parts = by_name(host_parts(MOE, LAYOUT, work(), gpus_per_node=8, reference=True, samples=128))
    weights = rank_weights(MOE, LAYOUT, 0)
    assert parts["parked weights"] == parts["reference weights"] == 8 * weights.total * 2
    assert parts["optimizer"] == 8 * 12 * (weights.dense // 4 + weights.experts // 2)
    assert parts["routes of a rollout"] == 128 * 10_000 * 48 * 8 * 2
