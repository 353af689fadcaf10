"""The rows above and below the board: header, phase bar, the worst alert, the banner of a frozen view."""

from __future__ import annotations

from miles.record.status import RunStatus
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.numbers import duration
from miles_cli.dashboard.scene import Scene, cut, spread, width_of
from miles_cli.dashboard.snapshot import SEVERITIES, OpenPhase

STALE = 30.0
"""Seconds without a sign of life, or six step times, after which a run is shown as silent."""
SLOW, STUCK = 2.0, 6.0
"""A phase this many times over its own median is slow, or stuck."""


def header(scene: Scene, width: int) -> list[Line]:
    """Two rows: who and how far; what it does now and how it is."""
    run, between = scene.run, scene.symbols.between
    glyph, style, word = liveness(scene)
    progress = _progress(scene, width)
    # The step stays at any width: a name that is too long beside it is told by its end.
    room = width - width_of(progress[0]) - 2
    name = _shortened(run.name, room - len(f" {glyph} "), scene.symbols.ellipsis)
    who: list[Line] = [[(f" {glyph} ", style), (name, "strong")], [(word, style)]]
    if run.profile:
        who.append([("profile ", "axis"), (run.profile, "label")])
    if run.attempt > 1:
        who.append([(f"attempt {run.attempt}", "label")])
    if len(scene.runs) > 1:
        who = [_cut_to([(f" {glyph} ", style), *_run_legend(scene)], room), *who[1:]]
    second: list[Line] = [_doing(scene)]
    if run.loading is not None:
        second.append([(f"reading the record {100 * run.loading:.0f}%", "warning")])
    return [
        spread(who, progress, width, between),
        spread(second, [_alerts(scene), _age(scene)], width, between),
    ]


def _run_legend(scene: Scene) -> Line:
    """Every run with the glyph that marks its curves; the one in front is bold and in brackets."""
    line: Line = []
    for i, run in enumerate(scene.runs):
        k = i % len(scene.symbols.runs)
        label = _run_label(run.name, scene.symbols.ellipsis)
        if i == scene.current:
            line += [(f"[{scene.symbols.runs[k]} ", f"run{k}"), (label, "strong"), ("] ", f"run{k}")]
        else:
            line += [(f" {scene.symbols.runs[k]} ", f"run{k}"), (f"{label}  ", "label")]
    return line


def _run_label(name: str, ellipsis: str) -> str:
    return name if len(name) <= 14 else ellipsis + name[-12:]


def _shortened(name: str, width: int, ellipsis: str) -> str:
    """The end of a long name, for that is where names that a run gives itself differ; none where it would say
    nothing."""
    if len(name) <= width:
        return name
    kept = width - len(ellipsis)
    return ellipsis + name[-kept:] if kept >= 4 else ""


def _cut_to(line: Line, width: int) -> Line:
    return line if width_of(line) <= width else cut(line, max(width, 0))


def liveness(scene: Scene) -> tuple[str, str, str]:
    """Glyph, style and word: judged by heartbeat and age, never by what the run says of itself."""
    run, symbols = scene.run, scene.symbols
    if run.status is RunStatus.FINISHED:
        return symbols.good, "good", "finished"
    if run.status in (RunStatus.DEAD, RunStatus.FAILED):
        return symbols.bad, "critical", str(run.status)
    if run.status is RunStatus.RUNNING:
        silent = age(scene) > max(STALE, STUCK * (run.step_seconds or 0.0))
        return (symbols.warning, "warning", "silent") if silent else (symbols.dot, "good", "running")
    return symbols.cleared, "warning", str(run.status)


def age(scene: Scene) -> float:
    """Seconds since the last event."""
    return max(0.0, scene.now - scene.run.last_time) if scene.run.last_time else 0.0


def _age(scene: Scene) -> Line:
    if not scene.run.last_time:
        return [("no event yet", "axis")]
    glyph, style, _ = liveness(scene)
    return [(f"{glyph} ", style), (f"last event {duration(age(scene))} ago ", "axis")]


def _progress(scene: Scene, width: int) -> list[Line]:
    run, symbols = scene.run, scene.symbols
    if run.step is None:
        return [[("no step yet ", "axis")]]
    if run.total is None:
        return [[("step ", "axis"), (f"{run.step} ", "value")]]
    fields: list[Line] = [[("step ", "axis"), (f"{run.step}/{run.total}", "value")]]
    if width >= 100:
        cells = 20 if width >= 140 else 12
        filled = min(cells, cells * run.step // max(1, run.total))
        bar: Line = [(symbols.bar * filled, "line"), (symbols.track * (cells - filled), "axis")]
        fields[0] = [*fields[0], (" ", ""), *bar, (f" {100 * run.step // max(1, run.total)}%", "label")]
    if run.eta is not None:
        fields.append([("ETA ", "axis"), (f"{duration(run.eta)} ", "value")])
    else:
        fields.append([(f"took {duration(run.last_time - run.first_time)} ", "axis")])
    return fields


def _doing(scene: Scene) -> Line:
    """The innermost open phase, how long it has lasted, and how long it usually does."""
    run = scene.run
    if run.status.ended:
        where = run.open_phases[-1].name if run.open_phases else None
        return [(f" ended in {where}" if where else " replay of the record", "warning" if where else "axis")]
    if not run.open_phases:
        return [(" between phases", "axis")]
    phase = run.open_phases[-1]
    elapsed, usual = max(0.0, scene.now - phase.start), run.medians.get(phase.name)
    style, glyph = _pace(phase, elapsed, usual, scene)
    line: Line = [(f" {glyph} ", style), (phase.name, "strong"), (f" {duration(elapsed)}", style)]
    if usual is not None:
        line.append((f" (usually {duration(usual)})", "axis"))
    return line


def _pace(phase: OpenPhase, elapsed: float, usual: float | None, scene: Scene) -> tuple[str, str]:
    if usual is None or elapsed < max(1.0, SLOW * usual):
        return "label", scene.symbols.now
    return (
        ("critical", scene.symbols.critical)
        if elapsed > STUCK * usual
        else ("warning", scene.symbols.warning)
    )


def _alerts(scene: Scene) -> Line:
    counts, symbols = scene.run.alert_counts(), scene.symbols
    line: Line = []
    for severity in SEVERITIES:
        style = severity if counts[severity] else "axis"
        line.append((f"{symbols.severity(severity)} {counts[severity]} ", style))
    return [("alerts ", "axis"), *line]


def phase_bar(scene: Scene, width: int) -> Line:
    """Where the time of recent steps went: each phase as wide as its share; the running one is marked."""
    run, symbols = scene.run, scene.symbols
    cycle = tuple(run.phase_totals.items())
    total = sum(seconds for _, seconds in cycle)
    if not total:
        return cut([(" the phases of a step appear here when the first has ended", "axis")], width)
    running = {phase.name for phase in run.open_phases} if not run.status.ended else set()
    widths = _shares([seconds for _, seconds in cycle], width - 2)
    line: Line = [(" ", "")]
    for i, ((name, seconds), cells) in enumerate(zip(cycle, widths, strict=True)):
        fill = symbols.fills[i % len(symbols.fills)]
        mark = symbols.now if name in running else ""
        line += _segment(name, seconds / total, cells, fill, f"phase{i % 8}", mark)
    return cut(line, width)


def _shares(seconds: list[float], width: int) -> list[int]:
    """Whole cells in proportion, at least one each, summing to `width`."""
    total = sum(seconds)
    cells = [max(1, round(width * s / total)) for s in seconds]
    while sum(cells) > width and max(cells) > 1:
        cells[cells.index(max(cells))] -= 1
    cells[cells.index(max(cells))] += max(0, width - sum(cells))
    return cells


def _segment(name: str, share: float, cells: int, fill: str, style: str, mark: str) -> Line:
    """Fill with the name inside; the share too where there is room."""
    label = f" {mark}{name} {100 * share:.0f}% "
    if len(label) > cells - 2:
        label = f" {mark}{name} "
    if len(label) > cells - 1:
        label = mark[:cells]
    after = cells - len(label) - (1 if cells > len(label) else 0)
    text = "strong" if mark else "label"
    return [(fill * (cells - len(label) - after), style), (label, text), (fill * after, style)]


def alert_bar(scene: Scene, width: int) -> Line:
    """The worst open alert, what ended a dead run, or the banner of a view that is not live."""
    symbols = scene.symbols
    if scene.frozen:
        return cut([(f" {symbols.paused} {_banner(scene)} ", "banner"), (" " * width, "banner")], width)
    found = scene.run.open_alerts
    if not found and (cause := scene.run.cause_of_death) is not None:
        died: Line = [(f" {symbols.bad} ", "critical"), (cause.splitlines()[0], "strong")]
        return spread([died], [[("o", "key"), (" log ", "axis")]], width, " ")
    if not found:
        return spread(
            [[(f" {symbols.good} ", "good"), ("no open alerts", "axis")]], [filter_note(scene)], width, " "
        )
    worst = found[0]
    step = "" if worst.step is None else f" since step {worst.step}"
    line: Line = [
        (f" {symbols.severity(worst.severity)} {worst.rule} ", worst.severity),
        (worst.title, "strong"),
        (step, "axis"),
    ]
    hint: Line = [("a", "key"), (" evidence  ", "axis"), ("f", "key"), (" fix ", "axis")]
    return spread([line], [hint], width, " ")


def _banner(scene: Scene) -> str:
    cursor, run = scene.view.cursor, scene.run
    if run.status.ended:
        at = "" if cursor is None else f" step {cursor} of {run.last_step}"
        return f"replay{at}: , and . one step, < and > to an alert, end = the newest"
    at = "" if cursor is None else f" at step {cursor}"
    lag = f"{duration(scene.behind)} and {scene.behind_steps} steps behind live"
    return f"view frozen{at}: {lag}; collection goes on. end = live"


def filter_note(scene: Scene) -> Line:
    view = scene.view
    said = [f"filter {view.query}"] if view.query else []
    said += ["log scale"] if view.log else []
    said += [f"last {view.window} steps"] if view.window else []
    said += [] if view.averaged else ["no average"]
    return [(f"{', '.join(said)} ", "label")] if said else [(f"{view.preset} ", "axis")]
