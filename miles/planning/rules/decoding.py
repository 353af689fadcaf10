"""Rules on the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.decode_kernel import obstacles
from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject
from miles.planning.train_kernel import obstacles as training_obstacles


@rule(
    "KRN1",
    Severity.ERROR,
    title="the fused decode kernel cannot be used",
    cause="it is compiled where the engine runs, and computes in fp32 on one CPU thread",
    fix="leave --decode-kernel out: torch decodes where the kernel cannot",
    local=True,
)
def fused_impossible(subject: Subject) -> Iterator[Found]:
    if subject.config.engine.decode_kernel == "fused" and subject.config.rollout.backend == "native":
        for obstacle in obstacles(subject.engine_kind, subject.facts.machine.compiler):
            yield Found(f"decode_kernel = fused: {obstacle}", "engine.decode_kernel")


@rule(
    "KRN2",
    Severity.ERROR,
    title="the fused training kernel cannot be used",
    cause="it is compiled where the trainer runs, and computes in fp32 on one CPU thread",
    fix="leave --train-kernel out: torch trains where the kernel cannot",
    local=True,
)
def fused_training_impossible(subject: Subject) -> Iterator[Found]:
    if subject.config.training.train_kernel == "fused" and subject.config.training.backend == "native":
        for obstacle in training_obstacles(subject.trainer_kind, subject.facts.machine.compiler):
            yield Found(f"train_kernel = fused: {obstacle}", "training.train_kernel")
