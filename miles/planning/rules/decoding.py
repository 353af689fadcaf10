"""Rules on the engine's decode kernel."""

from __future__ import annotations

from collections.abc import Iterator

from miles.planning.decode_kernel import obstacles
from miles.planning.findings import Found, Severity
from miles.planning.rules.rule import rule
from miles.planning.subject import Subject


@rule(
    "KRN1",
    Severity.ERROR,
    title="the fused decode kernel cannot be used",
    cause="it is compiled where the engine runs, and computes in fast fp32 on one CPU thread",
    fix="leave --decode-kernel out: torch decodes where the kernel cannot",
    local=True,
)
def fused_impossible(subject: Subject) -> Iterator[Found]:
    if subject.config.engine.decode_kernel == "fused" and subject.config.rollout.backend == "native":
        for obstacle in obstacles(subject.engine_kind, subject.facts.machine.compiler):
            yield Found(f"decode_kernel = fused: {obstacle}", "engine.decode_kernel")
