"""What of a run on GPUs becomes smaller, or is replaced, where it is rehearsed on the CPUs of one machine.

The trainer, the engine, the executor, the loop and everything that has a size stay those of the profile. A
change is made for one of three reasons: it is a size, it needs a GPU, or its part is not installed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from miles.arch import ArchSpec, with_mtp
from miles.arch.megatron import megatron_obstacle
from miles.config import ResolvedConfig, RunConfig
from miles.config.toml_text import literal
from miles.planning.layout import Layout
from miles.planning.nearest import nearest_layout
from miles.planning.scale import plan_layout
from miles.planning.speculation import mtp_layers

STEPS = 3
PROMPTS, PROMPT_LEN, RESPONSE_LEN = 4, 32, 16
MICRO_BATCHES = 4
"""Micro-batches that the samples of one rank make, about: the token budget is no larger."""

MACHINE = "the CPUs of one machine"


@dataclass(frozen=True)
class Change:
    """A setting of the profile, its value there and in the rehearsal, and why they differ."""

    setting: str
    old: Any
    new: Any
    why: str

    @property
    def assignment(self) -> str:
        """As `--set` takes it."""
        return f"{self.setting}={'default' if self.new is None else literal(self.new)}"


def sizes(
    resolved: ResolvedConfig, spec: ArchSpec, processes: int, has_server: bool, where: tuple[str, str]
) -> tuple[Change, ...]:
    """Everything that has a size, and the engine where no server can be started.

    Args:
        spec: the small model.
        processes: of the trainer.
        where: directory of the small model, and file of the prompts.
    """
    config = resolved.config
    changes = [
        *_model(config, *where),
        *_rollout(config),
        *_cluster(config),
        *_engine(config, spec, has_server),
        *_trainer(config, spec, processes),
    ]
    return tuple(change for change in changes if change.old != change.new)


def _change(config: RunConfig, setting: str, new: Any, why: str) -> Change:
    section, _, name = setting.partition(".")
    return Change(setting, getattr(getattr(config, section), name, None), new, why)


def _model(config: RunConfig, directory: str, prompts: str) -> Iterator[Change]:
    made = "a small model of the same family, with random weights"
    yield _change(config, "model.hf_checkpoint", directory, made)
    for setting in ("model.model_name", "model.load", "model.ref_load", "critic.critic_load"):
        yield _change(config, setting, None, made)
    if config.distillation.use_opd:
        yield from _without_teacher(config)
    yield _change(config, "data.prompt_data", prompts, "small sums, in the profile's columns")
    yield _change(config, "eval.eval_prompt_data", (), "a rehearsal measures nothing")


def _without_teacher(config: RunConfig) -> Iterator[Change]:
    why = "a teacher of the real model cannot read the small one's tokens"
    yield _change(config, "distillation.use_opd", False, why)
    yield _change(config, "distillation.opd_type", None, why)
    yield _change(config, "distillation.opd_teacher_load", None, why)
    yield _change(config, "distillation.opd_teacher_urls", (), why)
    yield _change(config, "distillation.opd_teacher_key", "opd_teacher", why)
    yield _change(config, "distillation.opd_kl_coef", 1.0, why)


def _rollout(config: RunConfig) -> Iterator[Change]:
    short = "three short steps"
    steps = config.training.num_steps_per_rollout or 1
    yield _change(config, "rollout.num_rollout", STEPS, short)
    yield _change(config, "rollout.rollout_batch_size", max(PROMPTS, steps), short)
    yield _change(config, "training.global_batch_size", None, short)
    yield _change(config, "rollout.over_sampling_batch_size", None, short)
    yield _change(config, "rollout.rollout_max_prompt_len", PROMPT_LEN, short)
    yield _change(config, "rollout.rollout_max_response_len", RESPONSE_LEN, short)
    yield _change(config, "rollout.rollout_max_context_len", None, short)
    if config.reward.custom_rm_path is None:
        equal = "an untrained model solves nothing, and equal rewards have no gradient"
        yield _change(config, "reward.rm_type", "random", equal)
        yield _change(config, "reward.rm_url", None, equal)
    if config.reward.overlong_buffer_len > RESPONSE_LEN:
        yield _change(config, "reward.overlong_buffer_len", RESPONSE_LEN, short)
    if config.training.max_tokens_per_gpu is not None:
        tokens = _samples(config) * (PROMPT_LEN + RESPONSE_LEN) // MICRO_BATCHES
        yield _change(config, "training.max_tokens_per_gpu", tokens, short)


def _samples(config: RunConfig) -> int:
    prompts = max(PROMPTS, config.training.num_steps_per_rollout or 1)
    return prompts * (config.rollout.n_samples_per_prompt or 1)


def _cluster(config: RunConfig) -> Iterator[Change]:
    for setting, new in (
        ("cluster.address", None),
        ("cluster.actor_num_nodes", 1),
        ("cluster.actor_num_gpus_per_node", 0),
        ("cluster.rollout_num_gpus", 0),
        ("cluster.rollout_num_gpus_per_engine", 1),
        ("engine.num_engines", 1),
    ):
        yield _change(config, setting, new, MACHINE)
    turns = "without a GPU there is no memory of one to take turns on"
    yield _change(config, "cluster.colocate", False, turns)


def _engine(config: RunConfig, spec: ArchSpec, has_server: bool) -> Iterator[Change]:
    if config.rollout.backend != "sglang":
        return
    missing = "" if has_server else "SGLang is not installed here: `make sglang-cpu` makes its environment"
    if spec.has_indexer:
        missing = "SGLang's attention to the keys of an indexer needs a GPU"
    if missing:
        yield _change(config, "rollout.backend", "native", missing)
        return
    args = config.sglang.server_args()
    for name in ("mem_fraction_static", "expert_parallel_size", "ep_size", "tp_size", "dp_size"):
        if name in args:
            yield Change(f"sglang.{name}", args[name], None, f"one server on {MACHINE}")


def _trainer(config: RunConfig, spec: ArchSpec, processes: int) -> Iterator[Change]:
    if config.training.backend != "megatron":
        yield _change(config, "training.data_parallel_size", processes, MACHINE)
        return
    obstacle = megatron_obstacle(with_mtp(spec, mtp_layers(config, spec.mtp_num_layers)))
    if obstacle:
        yield _change(config, "training.backend", "native", f"Megatron does not carry {obstacle}")
        yield _change(config, "training.data_parallel_size", processes, MACHINE)
        return
    layout = _layout(config, spec, processes)
    why = f"the layout over {layout.world} of {plan_layout(config).world} processes that is nearest"
    for name, new in (
        ("tensor_model_parallel_size", layout.tp),
        ("pipeline_model_parallel_size", layout.pp),
        ("context_parallel_size", layout.cp),
        ("expert_model_parallel_size", layout.ep),
        ("expert_tensor_parallel_size", layout.etp),
        ("sequence_parallel", layout.sequence_parallel),
        ("num_layers_per_virtual_pipeline_stage", layout.virtual_stage_layers),
        ("decoder_first_pipeline_num_layers", layout.first_stage_layers),
        ("decoder_last_pipeline_num_layers", layout.last_stage_layers),
    ):
        yield _change(config, f"parallel.{name}", new, why)
    yield _change(config, "training.data_parallel_size", layout.dp, why)
    yield _change(config, "training.transformer_impl", "local", "Transformer Engine needs a GPU")


def _layout(config: RunConfig, spec: ArchSpec, processes: int) -> Layout:
    """The nearest layout over as many processes, else over half as many, down to one."""
    asked = replace(plan_layout(config), world=processes)
    if asked.pp > 1 and processes < asked.pp:
        asked = replace(asked, first_stage_layers=None, last_stage_layers=None, virtual_stage_layers=None)
    found = nearest_layout(asked, spec, fits=lambda layout: _divides(config, layout))
    if found is not None:
        return found
    assert processes > 1, "one process needs no division"
    return _layout(config, spec, processes // 2)


def _divides(config: RunConfig, layout: Layout) -> bool:
    steps = config.training.num_steps_per_rollout or 1
    return _samples(config) % (layout.dp * steps) == 0
