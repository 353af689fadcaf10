"""A cluster profile becomes a run on CPUs: what stays, what becomes small, what is replaced and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from miles.config import ResolvedConfig, parse_flags, resolve, shipped_names
from miles.errors import ConfigError
from miles.orchestration import rehearsal
from miles.orchestration.rehearsal import rehearse
from miles.orchestration.small_model import write_small_model
from miles.planning import Plan, collect_facts, make_plan
from miles.planning.facts import machine, server
from miles.planning.rehearsal import Change

CLUSTER = [
    name
    for name in shipped_names()
    if "/" not in name and resolve(name).config.cluster.actor_num_gpus_per_node > 0
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _two_cores(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no environment of a server. Small models are made in this process, which has torch already."""
    monkeypatch.setenv("MILES_CACHE_DIR", str(cache))
    monkeypatch.setattr(rehearsal, "make_small_model", write_small_model)
    monkeypatch.setattr(machine, "_usable_cores", lambda: 2)
    monkeypatch.setattr(server, "ENVIRONMENT", "none")


def planned(name: str, flags: str = "") -> tuple[ResolvedConfig, dict[str, Change], Plan]:
    changed, changes = rehearse(resolve(name, flags=parse_flags(flags.split())))
    assert len({change.setting for change in changes}) == len(changes), "said once"
    plan = make_plan(changed, collect_facts(changed.config))
    return changed, {change.setting: change for change in changes}, plan


@pytest.mark.parametrize("name", CLUSTER)
def test_every_cluster_profile_can_be_rehearsed(name: str) -> None:
    _, changes, plan = planned(name)
    assert (plan.device, plan.num_rollouts, plan.executor) == ("cpu", 3, "ray")
    assert all(change.why and change.old != change.new for change in changes.values())


def test_what_is_not_a_size_stays_that_of_the_profile() -> None:
    profile, (changed, changes, plan) = resolve("qwen3-moe-fp8").config, planned("qwen3-moe-fp8")
    assert plan.trainer == "megatron" and plan.routing_replay and plan.dtype == "bf16"
    assert plan.rollout_format == "fp8", "the engine quantises on a CPU too"
    assert changed.config.algorithm == profile.algorithm
    assert changed.config.correction == profile.correction
    assert changed.config.training.recompute_granularity == "full"
    assert changes["parallel.expert_model_parallel_size"].old == 4
    assert changed.config.parallel.expert_model_parallel_size == 2
    assert "Transformer Engine" in changes["training.transformer_impl"].why


def test_tensor_parallelism_is_kept_as_far_as_processes_reach() -> None:
    parallel = planned("qwen3-235b-a22b")[0].config.parallel
    assert (parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size) == (2, 2)
    assert parallel.sequence_parallel


def test_without_sglang_the_native_engine_stands_in_and_how_to_get_it_is_said() -> None:
    _, changes, plan = planned("qwen3-4b")
    assert plan.engine == "native"
    assert "make sglang-cpu" in changes["rollout.backend"].why


def a_server(root: Path) -> str:
    """The flag that names an environment of SGLang's, as far as preflight looks at it."""
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "python").touch()
    (root / "lib/python3.11/site-packages/sglang-0.5.20.dist-info").mkdir(parents=True)
    return f"--server-python {root / 'bin' / 'python'}"


def test_a_server_that_is_there_is_used(tmp_path: Path) -> None:
    _, changes, plan = planned("qwen3-4b", a_server(tmp_path / "servers"))
    assert plan.engine == "sglang" and "rollout.backend" not in changes
    assert plan.server_args is not None and "mem_fraction_static" not in plan.server_args
    assert "sglang.mem_fraction_static" in changes


def test_an_indexer_is_rehearsed_with_the_native_engine_and_megatron(tmp_path: Path) -> None:
    flags = f"--model-name deepseek-v3.2 {a_server(tmp_path / 'servers')}"
    _, changes, plan = planned("deepseek-v3-fp8", flags)
    assert (plan.engine, plan.trainer) == ("native", "megatron")
    assert "indexer needs a GPU" in changes["rollout.backend"].why


def test_int4_is_rehearsed_on_both_sides_or_on_none(tmp_path: Path) -> None:
    name = "deepseek-v3-int4-single-node"
    changed, _, plan = planned(name)
    assert changed.config.precision.int4_qat and plan.rollout_format == "int4"
    assert (plan.trainer, plan.engine) == ("megatron", "native")
    changed, changes, plan = planned(name, a_server(tmp_path / "servers"))
    assert not changed.config.precision.int4_qat and plan.rollout_format == "bf16"
    assert "not with the sglang engine on a CPU" in changes["precision.int4_qat"].why


def test_a_run_without_gpus_has_nothing_to_rehearse() -> None:
    with pytest.raises(ConfigError, match="nothing to rehearse"):
        rehearse(resolve("quickstart"))


def test_a_teacher_a_reward_server_and_the_overlong_buffer_stay_at_home() -> None:
    flags = (
        "--use-opd --opd-teacher-urls http://teacher:80 --opd-kl-coef 0.5 --overlong-buffer-len 4096 "
        "--rm-type remote_rm --rm-url http://rewards:80"
    )
    changed, changes, _ = planned("qwen3-moe-fp8", flags)
    assert not changed.config.distillation.use_opd
    assert changed.config.reward.rm_url is None
    assert changes["reward.overlong_buffer_len"].new == changed.config.rollout.rollout_max_response_len
