"""What the form shows beside the questions: preflight, reward, plan, memory and facts, as styled text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from miles.planning import Finding, Plan, Severity
from miles.planning.memory import MemoryPlan
from miles.planning.outline import Outline
from miles_cli.dashboard.styles import ink_of
from miles_cli.dashboard.symbols import Symbols
from miles_cli.init.preview import Preview, fact_lines
from miles_cli.init.reward_trial import RewardTrial
from miles_cli.units import binary_bytes

LABEL = 11
BAR = 10


def panel(seen: Preview, trial: RewardTrial | None, symbols: Symbols) -> RenderableType:
    """Everything about the run that these answers make; `trial` is None while the reward is being tried."""
    parts: list[RenderableType] = [*_preflight(seen, symbols), *_reward(trial, symbols)]
    if seen.plan is not None:
        parts += _plan(seen.plan)
    if seen.outline is not None:
        parts += _phases(seen.outline, symbols)
    elif seen.memory is not None:
        free = seen.interview.scene.machine.memory_available_bytes
        parts += _memory(seen.memory, free, symbols)
    return Group(*parts, *_facts(seen))


def file_panel(seen: Preview) -> RenderableType:
    """The run file as it will be written; only its longest head lines are cut at the edge."""
    return Group(*map(_file_line, seen.text.splitlines()))


def _file_line(line: str) -> Text:
    style = "axis" if line.startswith("#") else "key" if line.startswith("[") else ""
    is_address = line.startswith(("#:schema", "#   miles"))
    return Text(
        line or " ",
        style=ink_of(style),
        no_wrap=is_address,
        overflow="ellipsis" if is_address else "fold",
    )


def _heading(text: str, style: str = "title") -> Text:
    return Text(text, style=ink_of(style))


def _indented(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=ink_of(style)), (0, 0, 0, 2))


def _preflight(seen: Preview, symbols: Symbols) -> Iterator[RenderableType]:
    for problem in seen.problems:
        yield _heading(f"{symbols.bad} Run file", "critical")
        yield _indented(str(problem))
    if seen.unreachable is not None:
        yield _heading(f"{symbols.bad} Cluster", "critical")
        yield _indented(str(seen.unreachable))
    if seen.interview.missing:
        yield _heading(f"{symbols.critical} Open", "critical")
        yield from (_indented(f"{question.title} ({question.flag})") for question in seen.interview.missing)
    findings = seen.findings_on_answers
    if not findings and seen.unreachable is None and seen.is_complete:
        yield _heading(f"{symbols.good} Preflight has nothing to say", "good")
    for finding in findings:
        yield from _finding(finding, symbols)


def _finding(finding: Finding, symbols: Symbols) -> Iterator[RenderableType]:
    error = finding.severity is Severity.ERROR
    sign, style = (symbols.critical, "critical") if error else (symbols.warning, "warning")
    if finding.severity is Severity.INFO:
        sign, style = symbols.info, "info"
    yield _heading(f"{sign} {finding.severity} {finding.rule}", style)
    yield _indented(finding.what)
    yield _indented(f"fix: {finding.fix}", "good")


def _reward(trial: RewardTrial | None, symbols: Symbols) -> Iterator[RenderableType]:
    if trial is None:
        yield _heading("Reward: trying two rows ...")
        return
    sign = {True: f"{symbols.good} Reward works", False: f"{symbols.bad} Reward fails", None: "Reward"}
    style = {True: "good", False: "critical", None: "title"}
    yield _heading(sign[trial.passed], style[trial.passed])
    yield from (_indented(line, "axis") for line in trial.lines)


def _plan(plan: Plan) -> Iterator[RenderableType]:
    batch, model = plan.batch, plan.model
    replay = "expert routes (R3)" if plan.routing_replay else "no routes"
    yield _heading("Plan")
    yield _table(
        ("model", f"{model.parameters:,} parameters, {plan.dtype}"),
        ("runs on", f"{plan.device}, {plan.executor} executor"),
        ("rollouts", f"{plan.num_rollouts} of {batch.samples_per_rollout} samples"),
        ("training", f"{plan.optimizer_steps} steps of {batch.global_batch_size} samples"),
        ("sequence", f"{plan.max_context_len} tokens, response {plan.max_response_len}"),
        ("replayed", replay),
        ("saved", f"{binary_bytes(plan.checkpoint_bytes)} per checkpoint"),
    )


def _memory(memory: MemoryPlan, free: int, symbols: Symbols) -> Iterator[RenderableType]:
    total = memory.total_bytes
    yield _heading(f"Memory: {binary_bytes(total)} of {binary_bytes(free)} free")
    rows = (
        (part.name, f"{binary_bytes(part.bytes):>10}  {symbols.bar * round(part.bytes / total * BAR)}")
        for part in memory.parts
    )
    yield _table(*rows)


def _phases(outline: Outline, symbols: Symbols) -> Iterator[RenderableType]:
    """Placement and layout, and each phase against the memory of a GPU with its largest part."""
    scale = outline.scale
    yield _heading("GPUs")
    yield _table(
        ("hardware", str(scale.hardware)),
        ("placement", f"{scale.placement.arithmetic} GPUs"),
        ("layout", str(scale.layout)),
    )
    yield _heading("Memory per GPU")
    for phase in scale.phases:
        share = phase.total_bytes / scale.gpu_bytes if scale.gpu_bytes else 0.0
        bar = symbols.bar * min(BAR, round(share * BAR))
        parts = f"most: {phase.largest.name} {binary_bytes(phase.largest.bytes)}"
        yield _table((phase.name, f"{binary_bytes(phase.total_bytes)} ({share:.0%}) {bar}"), ("", parts))


def _facts(seen: Preview) -> Iterator[RenderableType]:
    yield _heading("Facts")
    yield _table(*(tuple(fact.split(": ", 1)) for fact in fact_lines(seen.interview)), style="axis")


def _table(*rows: Sequence[str], style: str = "") -> RenderableType:
    """Labels beside texts that wrap within their own column."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=LABEL, no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(label, style=ink_of("axis")), Text(text, style=ink_of(style)))
    return Padding(grid, (0, 0, 0, 2))
