"""Panels of rows: phases with their share of a step, workers, alerts, the log."""

from __future__ import annotations

import time

from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.numbers import duration, number
from miles_cli.dashboard.paint_chart import head
from miles_cli.dashboard.panels import Panel, matching, passes
from miles_cli.dashboard.scene import Painted, Scene, cut
from miles_cli.dashboard.snapshot import Alert, LogLine


def paint_phases(panel: Panel, number_key: int, scene: Scene, width: int, height: int) -> Painted:
    """The share of each phase in the time of recent steps, and its own median."""
    totals = sorted(scene.run.phase_totals.items(), key=lambda item: -item[1])
    total = sum(seconds for _, seconds in totals) or 1.0
    longest = max((len(name) for name, _ in totals), default=0)
    room = max(4, width - longest - 16)
    body: list[Line] = []
    order = list(scene.run.phase_totals)
    for name, seconds in totals:
        filled = round(room * seconds / total)
        body.append(
            [
                (f" {name:<{longest}} ", "label"),
                (scene.symbols.bar * filled, f"phase{order.index(name) % 8}"),
                (" " * (room - filled), ""),
                (f" {100 * seconds / total:3.0f}% {duration(scene.run.medians.get(name, 0.0)):>6}", "value"),
            ]
        )
    if not body:
        body = [[(" no phase has ended yet", "axis")]]
    note: Line = [("share and median of recent steps", "axis")]
    return Painted(head(panel, number_key), note, _filled(body, width, height))


def paint_workers(panel: Panel, number_key: int, scene: Scene, width: int, height: int) -> Painted:
    """Each process with the age of its heartbeat, its phase and step; then what engines report."""
    symbols = scene.symbols
    body: list[Line] = []
    gone = False
    for worker in scene.run.workers:
        ended = scene.run.status.ended
        gone = gone or not (worker.alive or ended)
        glyph, style = (symbols.dot, "good") if worker.alive else (symbols.bad, "axis" if ended else "bad")
        age = "ended" if ended else f"{duration(max(0.0, scene.now - worker.time))} ago"
        doing = worker.phase or "idle"
        step = "" if worker.step is None else f"step {worker.step}"
        body.append(
            [
                (f" {glyph} ", style),
                (f"{worker.writer:<12}", "label"),
                (f" {doing:<14}", "value"),
                (f"{step:<10} {age}", "axis"),
            ]
        )
    for name in matching(panel.metrics, scene.run.tracks):
        body.append([("   ", ""), (f"{name:<28} ", "label"), (number(scene.run.tracks[name].last), "value")])
    if not body:
        body = [[(" no heartbeat yet", "axis")]]
    return Painted(head(panel, number_key), [], _filled(body, width, height), gone)


def paint_alerts(panel: Panel, number_key: int, scene: Scene, width: int, height: int) -> Painted:
    """Open alerts, worst first, then those that cleared, newest first."""
    run = scene.run
    cleared = sorted((a for a in run.alerts if a.cleared), key=lambda a: -a.time)
    body = [alert_line(alert, scene) for alert in [*run.open_alerts, *cleared]]
    if not body:
        body = [[(f" {scene.symbols.good} ", "good"), ("nothing has fired", "axis")]]
    note: Line = [(f"{len(run.open_alerts)} open", "bad" if run.open_alerts else "axis")]
    return Painted(head(panel, number_key), note, _filled(body, width, height), bool(run.open_alerts))


def alert_line(alert: Alert, scene: Scene) -> Line:
    symbols = scene.symbols
    glyph = symbols.cleared if alert.cleared else symbols.severity(alert.severity)
    style = "axis" if alert.cleared else alert.severity
    when = "" if alert.step is None else f"step {alert.step}"
    if alert.cleared and alert.cleared_step is not None:
        when = f"{alert.step}-{alert.cleared_step}"
    return [
        (f" {glyph} ", style),
        (f"{alert.rule:<5}", style),
        (f" {when:<10}", "axis"),
        (f" {alert.title}", "axis" if alert.cleared else "label"),
    ]


def paint_log(panel: Panel, number_key: int, scene: Scene, width: int, height: int) -> Painted:
    """The newest events in words, newest at the bottom."""
    known = scene.run.log
    if scene.view.cursor is not None:
        known = tuple(line for line in known if line.step is None or line.step <= scene.view.cursor)
    body = [log_row(line, scene) for line in known[-height:]]
    if not body:
        body = [[(" nothing out of the ordinary yet", "axis")]]
    return Painted(head(panel, number_key), [], _filled(body, width, height))


def log_row(line: LogLine, scene: Scene) -> Line:
    clock = time.strftime("%H:%M:%S", time.localtime(line.time))
    glyph = scene.symbols.severity(line.level) if line.level != "info" else " "
    where = "" if line.step is None else f"{line.step:>5} "
    return [
        (f" {clock} ", "axis"),
        (f"{glyph} ", line.level),
        (where, "axis"),
        (line.text, "label" if line.level == "info" else line.level),
    ]


def log_matches(line: LogLine, query: str) -> bool:
    return passes(f"{line.writer} {line.level} {line.text}", query)


def _filled(body: list[Line], width: int, height: int) -> list[Line]:
    rows = [cut(line, width) for line in body[:height]]
    return [*rows, *[[(" " * width, "")]] * (height - len(rows))]
