"""What a run file would make, before it is written: its plan, or why preflight refuses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from miles.config import ResolvedConfig, resolve
from miles.errors import ConfigError, MilesError, Unavailable
from miles.planning import Facts, Finding, Plan, PlanRefused, Severity, make_plan
from miles.planning.memory import MemoryPlan
from miles.planning.outline import Outline
from miles.planning.subject import Subject
from miles_cli.init.interview import Interview
from miles_cli.init.local_world import LocalWorld
from miles_cli.init.questions import QUESTIONS
from miles_cli.init.run_file import render, settings


@dataclass(frozen=True)
class Preview:
    """The text of a run file and everything that can be said about it."""

    text: str
    interview: Interview
    resolved: ResolvedConfig | None = None
    plan: Plan | None = None
    memory: MemoryPlan | None = None
    """The estimate of one process, for a refused run as well, where there is enough to make one."""
    outline: Outline | None = None
    """Placement, layout and memory in each phase of a run on GPUs, refused or not."""
    unreachable: MilesError | None = None
    """Why the cluster of the run could not be asked."""
    findings: tuple[Finding, ...] = ()
    problems: tuple[MilesError, ...] = ()
    """What is wrong with the file itself, before any fact."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that refuse the run."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)

    @property
    def findings_on_answers(self) -> tuple[Finding, ...]:
        """Findings without those that only say that an open question is open."""
        answered = settings(self.interview.values)
        asked = {question.setting for question in QUESTIONS}
        return tuple(f for f in self.findings if f.setting in answered or f.setting not in asked)

    @property
    def is_complete(self) -> bool:
        """Whether every question has an answer and the file can be read."""
        return not self.interview.missing and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "answers": {
                answer.question.id: {"value": answer.value, "why": answer.why, "given": answer.given}
                for answer in self.interview.answers
            },
            "missing": [question.flag for question in self.interview.missing],
            "plan": self.plan.as_dict() if self.plan else None,
            "unreachable": str(self.unreachable) if self.unreachable else None,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def preview(world: LocalWorld, interview: Interview, target: Path, schema: str = "") -> Preview:
    """Resolve and plan what the answers make. Nothing is written."""
    text = render(interview, str(target), tuple(fact_lines(interview)), schema)
    try:
        resolved = resolve(run_file=target, run_text=text)
    except ConfigError as error:
        return Preview(text, interview, problems=error.problems)
    facts, unreachable = _facts(world, resolved)
    seen = Preview(text, interview, resolved, memory=Subject(resolved, facts).memory, unreachable=unreachable)
    try:
        plan = make_plan(resolved, facts)
    except PlanRefused as refusal:
        return replace(seen, findings=refusal.findings, outline=refusal.outline)
    return replace(seen, plan=plan, findings=plan.findings, outline=plan.outline)


def _facts(world: LocalWorld, resolved: ResolvedConfig) -> tuple[Facts, MilesError | None]:
    """Facts of the run; without those of a cluster that does not answer, and then why."""
    try:
        return world.facts(resolved), None
    except (Unavailable, ConfigError) as error:
        return world.facts(resolved, ask_cluster=False), error


def fact_lines(interview: Interview) -> Iterator[str]:
    """The facts that the answers rest on, one line each."""
    scene, machine = interview.scene, interview.scene.machine
    gpus = ", ".join(gpu.name for gpu in machine.gpus) or "no GPU"
    yield (
        f"machine: {machine.cores} cores, {machine.memory_available_bytes / 2**30:.1f} of "
        f"{machine.memory_bytes / 2**30:.1f} GiB free, {gpus}, {machine.disk_free_bytes / 2**30:.0f} GiB of "
        f"disk under {machine.disk_path} · Ray: {scene.world.ray}"
    )
    if scene.checkpoint is not None:
        yield f"checkpoint: {scene.checkpoint}"
    if scene.columns is not None and scene.columns.problem:
        yield f"prompts: {scene.columns.problem}"
    elif scene.columns is not None:
        look = f" · {scene.data}" if scene.data else ""
        yield f"prompts: {scene.columns.num_rows:,} rows of {', '.join(scene.columns.names)}{look}"
