"""A plan is a pure function of the run file and the facts, and its arithmetic can be checked by hand."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest

from miles.arch import ArchSpec
from miles.config import ResolvedConfig, resolve
from miles.planning import Facts, PlanRefused, collect_facts, make_plan
from miles.planning.checkpoints import plan_checkpoints
from miles.planning.memory import estimate_memory
from miles.planning.threads import plan_threads

Make = Callable[..., ResolvedConfig]


def test_equal_inputs_give_equal_plans(resolved: Make, facts: Facts) -> None:
    assert make_plan(resolved(), facts) == make_plan(resolved(), facts)


def test_plan_is_json_able(resolved: Make, facts: Facts) -> None:
    plan = make_plan(resolved("--threads 2"), facts)
    read_back = json.loads(json.dumps(plan.as_dict()))
    assert read_back["batch"]["samples_per_rollout"] == 256
    assert read_back["memory"]["total_bytes"] == plan.memory.total_bytes
    assert read_back["exports"] == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
    assert [finding["rule"] for finding in read_back["findings"]] == ["THR1"]


def test_batch_arithmetic(resolved: Make, facts: Facts) -> None:
    plan = make_plan(resolved("--global-batch-size 64"), facts)
    assert plan.batch.samples_per_rollout == 32 * 8
    assert (plan.batch.global_batch_size, plan.batch.steps_per_rollout) == (64, 4)
    assert (plan.num_rollouts, plan.optimizer_steps) == (100, 400)


def test_epochs_become_whole_rollouts(resolved: Make, facts: Facts) -> None:
    plan = make_plan(resolved("--num-epoch 2", without="--num-rollout"), facts)
    assert plan.num_rollouts == 2 * 1000 // 32
    assert ("rollout.num_rollout", 62) in [(row.setting, row.value) for row in plan.derived]


def test_context_is_prompt_and_response(resolved: Make, facts: Facts) -> None:
    assert make_plan(resolved("--rollout-max-prompt-len 50"), facts).max_context_len == 50 + 64
    assert make_plan(resolved("--rollout-max-context-len 104"), facts).max_context_len == 104
    assert make_plan(resolved(), facts).max_context_len == 256


def test_derived_values_name_their_rule(resolved: Make, facts: Facts) -> None:
    derived = {row.setting: (row.value, row.rule) for row in make_plan(resolved(), facts).derived}
    assert derived["alignment.use_rollout_routing_replay"] == (True, "on for MoE models")
    assert derived["model.dtype"] == ("fp32", "the checkpoint's own type")
    assert derived["run.executor"][0] == "inline"
    assert derived["run.threads"] == (1, "one thread per process for small models")
    assert derived["training.global_batch_size"][0] == 256


def test_explicit_values_are_not_derived(resolved: Make, facts: Facts) -> None:
    plan = make_plan(resolved("--dtype bf16 --no-use-rollout-routing-replay --executor inline"), facts)
    assert (plan.dtype, plan.routing_replay, plan.executor) == ("bf16", False, "inline")
    derived = {row.setting for row in plan.derived}
    assert not derived & {"model.dtype", "alignment.use_rollout_routing_replay", "run.executor"}


def test_refusal_holds_every_finding_and_survives_pickling(resolved: Make, facts: Facts) -> None:
    run = resolved("--log-passrate --lr 0", without="--label-key")
    with pytest.raises(PlanRefused) as caught:
        make_plan(run, facts)
    assert {finding.rule for finding in caught.value.findings} == {"CAP1", "REW2", "LRN3"}
    assert str(caught.value).startswith("preflight refused the run: 2 errors\n")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.findings == caught.value.findings


def test_quickstart_is_planned_without_writing_anything(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("MILES_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MILES_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = resolve("quickstart")
    plan = make_plan(run, collect_facts(run.config))
    assert plan.findings == ()
    assert plan.model.weights == "made by a warm start"
    assert [item.name for item in plan.data] == ["prompts", "sort"]
    assert list(tmp_path.iterdir()) == []


def test_sglang_servers_take_memory_of_their_own(spec: ArchSpec) -> None:
    tokens = {"cached_tokens": 1, "micro_batch_tokens": 1}
    without = estimate_memory(spec, "fp32", **tokens, reference=False).total_bytes
    two = estimate_memory(spec, "fp32", **tokens, reference=False, servers=2).total_bytes
    assert two - without == 2 * (2_100 * 1024**2 + 226_112 * 4)


def test_memory_of_the_built_in_model_by_hand(spec: ArchSpec) -> None:
    plan = estimate_memory(spec, "fp32", cached_tokens=256 * 100, micro_batch_tokens=10, reference=False)
    parts = {part.name: part.bytes for part in plan.parts}
    assert parts["weights"] == 226_112 * 4
    assert parts["gradients"] == 226_112 * 4
    assert parts["optimizer"] == 226_112 * 8
    # Two layers, two key-value heads of 16, keys and values.
    assert parts["KV cache"] == 256 * 100 * (2 * 2 * 16 * 2) * 4
    assert plan.total_bytes == sum(parts.values())


@pytest.mark.parametrize(("dtype", "each"), [("fp32", 16), ("bf16", 16)])
def test_a_critic_is_a_second_model_with_a_head_of_one_row(dtype: str, each: int, spec: ArchSpec) -> None:
    plan = estimate_memory(spec, dtype, cached_tokens=1, micro_batch_tokens=1, reference=False, critic=True)
    parameters = 226_112 + spec.hidden_size
    assert {part.name: part.bytes for part in plan.parts}["critic"] == parameters * each
    saved = plan_checkpoints(spec, "fp32", 80, 20, None, critic=True).bytes_each
    assert saved == (226_112 + parameters) * 12


def test_sixteen_bit_weights_keep_an_fp32_master(spec: ArchSpec) -> None:
    plan = estimate_memory(spec, "bf16", cached_tokens=1, micro_batch_tokens=1, reference=True)
    parts = {part.name: part.bytes for part in plan.parts}
    assert parts["optimizer"] == 226_112 * 12
    assert parts["reference"] == 226_112 * 2


def test_checkpoints_on_disk(spec: ArchSpec) -> None:
    assert plan_checkpoints(spec, "fp32", 80, 20, None).kept == 4
    assert plan_checkpoints(spec, "fp32", 81, 20, None).kept == 5
    assert plan_checkpoints(spec, "fp32", 80, 20, 2).kept == 3, "the newest is written before the oldest goes"
    assert plan_checkpoints(spec, "fp32", 80, None, None).kept == 1
    assert plan_checkpoints(spec, "fp32", 80, 20, None).bytes_each == 226_112 * 12


def test_threads(spec: ArchSpec) -> None:
    large = replace(spec, hidden_size=2048)
    assert plan_threads(None, None, spec, cores=8).count == 1
    assert plan_threads(None, None, large, cores=8).count == 8
    assert plan_threads(None, "3", spec, cores=8).count == 3
    assert plan_threads(2, "3", spec, cores=8).count == 2
    assert plan_threads(None, "many", spec, cores=8).count == 1
    assert "OMP_WAIT_POLICY" not in plan_threads(None, None, spec, cores=8).exports
