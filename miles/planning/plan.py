"""What a run will be, decided before it starts: backends, batches, threads, memory, derived values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from miles.arch.precision import PrecisionPolicy
from miles.config import ResolvedConfig
from miles.planning.batches import BatchPlan
from miles.planning.decode_kernel import KernelPlan
from miles.planning.engine_limits import EngineLimits
from miles.planning.facts import Facts
from miles.planning.findings import Finding, PlanRefused, Severity
from miles.planning.memory import MemoryPlan
from miles.planning.outline import Outline, make_outline
from miles.planning.preflight import preflight
from miles.planning.rehearsal import Change
from miles.planning.speculation import SpeculationPlan
from miles.planning.subject import Subject
from miles.planning.threads import ThreadPlan
from miles.planning.workers import WorkersPlan


@dataclass(frozen=True)
class Derived:
    """A value that nobody wrote down, and the rule that gave it."""

    setting: str
    value: Any
    rule: str


@dataclass(frozen=True)
class ModelSummary:
    """The model in numbers."""

    checkpoint: str
    architecture: str
    parameters: int
    active_parameters: int
    layers: int
    moe_layers: int
    weights: str
    """Where the first weights come from."""


@dataclass(frozen=True)
class DataSummary:
    """One prompt set in numbers; a length is None where no prompt could be tokenised beforehand."""

    name: str
    path: str
    rows: int | None
    longest_prompt: int | None


@dataclass(frozen=True)
class Plan:
    """Everything decided before a run; the run directory keeps it as plan.json."""

    executor: str
    trainer: str
    engine: str
    device: str
    dtype: str
    rollout_format: str
    """Format of the engine's weights; where it is not `dtype`, the engine has a copy of its own."""
    precision: PrecisionPolicy
    """How every published tensor is stored and computed with."""
    batch: BatchPlan
    num_rollouts: int
    optimizer_steps: int
    max_response_len: int
    max_context_len: int
    engine_limits: EngineLimits
    micro_batch_tokens: int | None
    """Token budget of a micro-batch, or None where micro-batches count samples."""
    micro_batch_size: int
    routing_replay: bool
    numerics: Literal["exact", "fast"]
    """Exact: bit-equal trainer and engine, whatever is computed together."""
    decode: KernelPlan | None
    """What decodes in the native engine; None for other engines."""
    train_kernel: KernelPlan | None
    """What computes the hot parts of the native trainer's steps; None for other trainers."""
    threads: ThreadPlan
    workers: WorkersPlan | None
    """Processes beside the driver; None where everything happens in one."""
    exports: tuple[tuple[str, str], ...]
    """Environment variables set before torch loads."""
    memory: MemoryPlan
    checkpoint_bytes: int
    """Disk space of one checkpoint."""
    model: ModelSummary
    data: tuple[DataSummary, ...]
    derived: tuple[Derived, ...]
    findings: tuple[Finding, ...]
    """Warnings and notes of preflight; a plan with errors is never made."""
    server_args: Mapping[str, Any] | None = None
    """What every SGLang server is told, by SGLang's own names; None for other engines."""
    server_python: str | None = None
    """What runs SGLang servers; None where the run starts none."""
    speculation: SpeculationPlan | None = None
    """How the native engine guesses ahead; None: it does not."""
    outline: Outline | None = None
    """Placement, layout and memory on GPUs; None for a run that asks for none."""
    rehearsal: tuple[Change, ...] = ()
    """What differs from the run on GPUs that this one rehearses; empty for any other."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values, totals included."""
        values = asdict(replace(self, outline=None))
        values["outline"] = self.outline.as_dict() if self.outline else None
        values["batch"]["samples_per_rollout"] = self.batch.samples_per_rollout
        values["memory"]["total_bytes"] = self.memory.total_bytes
        values["exports"] = dict(self.exports)
        return values


def make_plan(resolved: ResolvedConfig, facts: Facts) -> Plan:
    """Decide everything about a run. Pure: equal inputs give equal plans.

    Raises:
        PlanRefused: with every finding, when a rule of severity error fires.
    """
    findings, subject = preflight(resolved, facts), Subject(resolved, facts)
    outline = make_outline(subject)
    if any(finding.severity is Severity.ERROR for finding in findings):
        raise PlanRefused(*findings, outline=outline)
    return _plan(subject, findings, outline)


def _plan(subject: Subject, findings: tuple[Finding, ...], outline: Outline | None) -> Plan:
    config, spec, disk = subject.config, subject.spec, subject.checkpoints
    memory = subject.memory or (outline.scale.peak_memory if outline else None)
    batch, dtype, context = subject.batch, subject.dtype, subject.max_context_len
    rollouts, steps = subject.num_rollouts, subject.optimizer_steps
    response = config.rollout.rollout_max_response_len
    limits, precision = subject.engine_limits, subject.precision
    assert spec and memory and disk and batch and dtype and context and rollouts and steps and response, (
        "a rule of severity error must fire where one of these is unknown"
    )
    assert limits is not None, "they follow from the context"
    assert precision is not None, "it follows from the model"
    training = config.training
    return Plan(
        executor=subject.executor,
        trainer=training.backend,
        engine=config.rollout.backend,
        device="cuda" if outline else "cpu",
        dtype=dtype,
        rollout_format=subject.rollout_format or dtype,
        precision=precision,
        batch=batch,
        num_rollouts=rollouts,
        optimizer_steps=steps,
        max_response_len=response,
        max_context_len=context,
        engine_limits=limits,
        micro_batch_tokens=training.max_tokens_per_gpu if training.use_dynamic_batch_size else None,
        micro_batch_size=training.micro_batch_size,
        routing_replay=subject.routing_replay,
        numerics=subject.numerics,
        decode=subject.decode,
        train_kernel=subject.train_kernel,
        threads=subject.threads,
        workers=subject.workers,
        exports=(*subject.threads.exports.items(), *(outline.scale.exports if outline else ())),
        memory=memory,
        checkpoint_bytes=disk.bytes_each,
        model=_model(subject),
        data=_data(subject.facts),
        derived=tuple(_derived(subject)),
        findings=findings,
        server_args=subject.server_args,
        server_python=subject.facts.server.python
        if subject.starts_servers and subject.facts.server
        else None,
        speculation=subject.speculation,
        outline=outline,
    )


def _model(subject: Subject) -> ModelSummary:
    spec, checkpoint = subject.spec, subject.facts.checkpoint
    assert spec is not None
    builtin = checkpoint.state == "builtin"
    return ModelSummary(
        checkpoint=checkpoint.name,
        architecture=spec.architecture,
        parameters=spec.num_parameters(),
        active_parameters=spec.num_active_parameters(),
        layers=spec.num_layers,
        moe_layers=len(spec.moe_layers),
        weights="made by a warm start" if builtin else subject.config.model.load or checkpoint.name,
    )


def _data(facts: Facts) -> tuple[DataSummary, ...]:
    sets = (*((facts.prompts,) if facts.prompts else ()), *facts.evals)
    return tuple(
        DataSummary(item.name, item.path, item.num_rows, max(item.prompt_tokens, default=None))
        for item in sets
    )


def _derived(subject: Subject) -> list[Derived]:
    """Values of the run that follow from facts, after those that follow from other settings."""
    config = subject.config
    rows = [
        Derived(setting, subject.value(setting), origin.source)
        for setting, origin in subject.resolved.origins.items()
        if not origin.is_explicit and subject.uses(setting)
    ]
    rows.append(Derived("run.threads", subject.threads.count, subject.threads.rule))
    if config.run.executor == "auto":
        one = "one trainer and one engine on one machine, taking turns"
        several = (
            "several trainer ranks, engines or reward workers, one step ahead, fully async, or a cluster"
        )
        rows.append(
            Derived("run.executor", subject.executor, one if subject.executor == "inline" else several)
        )
    if config.model.dtype is None:
        rows.append(Derived("model.dtype", subject.dtype, "the checkpoint's own type"))
    if config.alignment.use_rollout_routing_replay is None:
        reason = "on for MoE models" if subject.routing_replay else "off: no MoE layers"
        rows.append(Derived("alignment.use_rollout_routing_replay", subject.routing_replay, reason))
    if config.alignment.numerics is None:
        reason = "true on-policy mode" if subject.numerics == "exact" else "true on-policy mode is off"
        rows.append(Derived("alignment.numerics", subject.numerics, reason))
    if config.engine.decode_kernel == "auto" and subject.decode is not None:
        rows.append(Derived("engine.decode_kernel", subject.decode.kernel, subject.decode.reason))
    if config.training.train_kernel == "auto" and (kernel := subject.train_kernel) is not None:
        rows.append(Derived("training.train_kernel", kernel.kernel, kernel.reason))
    rows += _derived_speculation(subject)
    if config.rollout.num_rollout is None:
        rows.append(
            Derived("rollout.num_rollout", subject.num_rollouts, "epochs × prompts / rollout_batch_size")
        )
    if config.rollout.rollout_max_context_len is None:
        rule = (
            "prompt and response limits" if config.rollout.rollout_max_prompt_len else "the model's positions"
        )
        rows.append(Derived("rollout.rollout_max_context_len", subject.max_context_len, rule))
    if config.checkpoint.save is None:
        rows.append(Derived("checkpoint.save", "checkpoints", "inside the run directory"))
    return rows


def _derived_speculation(subject: Subject) -> Iterator[Derived]:
    plan, written = subject.speculation, subject.config.sglang
    if plan is None:
        return
    rules = {
        "speculative_num_steps": (plan.num_steps, "SGLang's default for a draft of MTP layers"),
        "speculative_eagle_topk": (plan.eagle_topk, "a chain"),
        "speculative_num_draft_tokens": (plan.num_draft_tokens, "steps × branches + 1"),
    }
    for name, (value, rule) in rules.items():
        if getattr(written, name) is None:
            yield Derived(f"sglang.{name}", value, rule)
