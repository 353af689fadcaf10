"""A run on GPUs is planned from a laptop: placement, layout, memory, exports, and what is left out there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest

from miles.arch.specs import shipped_spec
from miles.config import ResolvedConfig, parse_flags, resolve
from miles.planning import Facts, PlanRefused, collect_facts, make_plan, preflight
from miles.planning.hardware import parse_hardware
from miles.planning.outline import Outline, make_outline
from miles.planning.placement import plan_placement
from miles.planning.rules import REGISTRY
from miles.planning.scale import larger_that_fits, nearest_that_fits
from miles.planning.subject import Subject

Make = Callable[..., ResolvedConfig]

PROFILE = "qwen3-moe-fp8"


def subject(flags: str = "", hardware: str = "16xH100") -> Subject:
    resolved = resolve(PROFILE, flags=parse_flags(flags.split()))
    return Subject(resolved, collect_facts(resolved.config, assume=parse_hardware(hardware)))


def outline(flags: str = "", hardware: str = "16xH100") -> Outline:
    found = make_outline(subject(flags, hardware))
    assert found is not None
    return found


def rules(flags: str = "", hardware: str = "16xH100") -> set[str]:
    run = subject(flags, hardware)
    return {finding.rule for finding in preflight(run.resolved, run.facts)}


SAID = {"CAP6", "ASM1"}
"""Wired only, and planned for hardware that is not here."""


def test_the_cluster_profile_passes_and_says_that_no_gpu_ran_it() -> None:
    assert rules() == SAID


def test_the_model_comes_from_its_name_where_no_checkpoint_is_here() -> None:
    found = outline()
    assert found.model == "qwen3-30b-a3b (shipped architecture)"
    assert found.parameters == 30_532_122_624


def test_placement_arithmetic() -> None:
    together = plan_placement(subject().config)
    assert (together.total_gpus, together.engines) == (16, 2)
    apart = plan_placement(subject("--no-colocate --rollout-num-gpus 8").config)
    assert (apart.total_gpus, apart.engines) == (24, 1)
    assert apart.arithmetic == "2 x 8 for the trainer + 8 for engines = 24"


def test_a_critic_is_a_second_model_on_every_gpu() -> None:
    """A policy without its head; on the host with it while engines have the GPU."""
    ppo = "--advantage-estimator ppo"
    assert rules(ppo) - rules() <= {"GPU2", "GPU3", "HST1"}
    phases = {
        phase.name: {part.name: part.bytes for part in phase.parts} for phase in outline(ppo).scale.phases
    }
    training = phases["training"]
    policy = sum(training[name] for name in ("weights", "gradients", "optimizer"))
    assert 0.8 * policy < training["critic"] < policy
    assert "critic" not in phases["rollout"] and "critic" not in phases["weight sync"]
    host = {part.name for part in outline(ppo).scale.host}
    assert {"critic's optimizer", "critic's parked weights"} <= host
    assert not any("critic" in part.name for phase in outline().scale.phases for part in phase.parts)


def test_exports_follow_the_hardware() -> None:
    scales = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    assert dict(outline(hardware="16xH100").scale.exports)[scales] == "1"
    assert dict(outline(hardware="16xB200").scale.exports)[scales] == "0"


def test_a_layout_with_a_problem_has_no_phases_but_an_outline() -> None:
    found = outline("--pipeline-model-parallel-size 3")
    assert found.scale.phases == ()
    assert {problem.rule for problem in found.scale.problems} == {"LAY1"}


def test_every_phase_is_planned_for_the_longest_sample() -> None:
    short, long = outline(), outline("--rollout-max-response-len 30000")
    by_name = {phase.name: phase.total_bytes for phase in short.scale.phases}
    assert {phase.name for phase in long.scale.phases if phase.total_bytes > by_name[phase.name]} >= {
        "training",
        "log-probs",
    }


def test_a_refusal_names_the_nearest_layout_and_that_one_works() -> None:
    asked = subject("--tensor-model-parallel-size 4 --expert-model-parallel-size 1 --sequence-parallel")
    finding = next(f for f in preflight(asked.resolved, asked.facts) if f.rule == "LAY6")
    flags = finding.fix.split("works: ")[1].split(" (DP")[0]
    assert not {rule for rule in rules(flags) if rule.startswith(("LAY", "MEM"))}


def test_memory_that_does_not_fit_names_the_largest_part_and_what_works() -> None:
    run = subject(
        "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --no-use-distributed-optimizer "
        "--no-optimizer-cpu-offload --no-overlap-cpu-optimizer-d2h-h2d"
    )
    finding = next(f for f in preflight(run.resolved, run.facts) if f.rule == "MEM3")
    assert "the largest part is optimizer" in finding.what
    assert "--use-distributed-optimizer" in finding.fix
    assert "nearest layout that works: --tensor-model-parallel-size" in finding.fix


def test_a_model_that_fits_no_layout_is_told_so() -> None:
    run = subject("--model-name qwen3-235b-a22b", "16xL40S")
    assert run.scale_request is not None and run.scale is not None
    assert nearest_that_fits(run.scale_request, run.scale.layout) is None
    fix = next(f.fix for f in preflight(run.resolved, run.facts) if f.rule == "LAY3")
    larger = larger_that_fits(run.scale_request, run.scale.layout)
    assert larger is not None
    assert fix == f"no layout over 16 L40S works; over {larger.world} does: {larger.flags}"
    assert nearest_that_fits(run.scale_request, replace(run.scale.layout, world=larger.world // 2)) is None


def test_rules_about_this_machine_are_left_out_for_another() -> None:
    local = {rule.id for rule in REGISTRY.values() if rule.local}
    assert {"DAT1", "DSK1", "MEM1", "SHM1", "VER1", "ENV2"} <= local
    assert not rules() & local


def test_a_checkpoint_without_a_known_name_cannot_be_planned() -> None:
    assert "MOD1" in rules("--model-name no-such-model")
    assert make_outline(subject("--model-name no-such-model")) is None


def test_the_refusal_carries_the_outline_through_pickling() -> None:
    run = subject("--attention-dropout 0.1")
    with pytest.raises(PlanRefused) as caught:
        make_plan(run.resolved, run.facts)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.outline == caught.value.outline
    assert json.loads(json.dumps(copy.outline.as_dict()))["placement"]["total_gpus"] == 16


def test_a_run_on_cpu_has_no_outline(resolved: Make, facts: Facts) -> None:
    assert make_outline(Subject(resolved(), facts)) is None
    assert make_plan(resolved(), facts).as_dict()["outline"] is None


def test_checkpoints_own_config_wins_over_the_name(resolved: Make, facts: Facts) -> None:
    run = resolved("--model-name qwen3-30b-a3b")
    checkpoint = replace(facts.checkpoint, spec=shipped_spec("qwen3-4b"))
    found = Subject(run, replace(facts, checkpoint=checkpoint)).spec
    assert found == shipped_spec("qwen3-4b")
    told = next(f for f in preflight(run, replace(facts, checkpoint=checkpoint)) if f.rule == "MOD7").what
    assert "family qwen3, qwen3-30b-a3b has qwen3_moe" in told
    assert "expert width absent" in told


def test_the_published_cluster_layout_passes() -> None:
    """TP 4, EP 8 on two nodes: the layout that miles publishes for this model and precision."""
    flags = "--tensor-model-parallel-size 4 --sequence-parallel --pipeline-model-parallel-size 1 "
    assert rules(flags + "--expert-model-parallel-size 8") == SAID


OWN_HARDWARE = {
    "qwen3-moe-fp8": "16xH100",
    "qwen3-4b": "8xH100",
    "llama-3.1-8b": "8xH100",
    "qwen3-235b-a22b": "64xH100",
    "deepseek-v3-fp8": "128xH100",
    "deepseek-v3-int4-single-node": "144xH200",
    "glm-4.5-spec": "64xH100",
    "minimax-m2": "64xH100",
    "gemma-3-12b": "8xH100",
    "qwen3-4b-true-on-policy": "cpu",
}
SAID_BESIDES = {
    # R3 with a draft is worth watching.
    "glm-4.5-spec": {"ALN5"},
}


@pytest.mark.parametrize(("profile", "hardware"), OWN_HARDWARE.items())
def test_a_shipped_cluster_profile_fits_its_own_hardware(profile: str, hardware: str) -> None:
    resolved = resolve(profile)
    facts = collect_facts(resolved.config, assume=parse_hardware(hardware))
    found = {finding.rule for finding in preflight(resolved, facts)}
    on_gpus = {"CAP6"} if hardware != "cpu" else set()
    assert found == {"ASM1"} | on_gpus | SAID_BESIDES.get(profile, set())
