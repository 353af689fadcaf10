"""The alerts with their evidence."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from miles_cli.dashboard import fixes
from miles_cli.dashboard.actions import ALERTS, LIST
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.fix_window import FixWindow
from miles_cli.dashboard.numbers import number
from miles_cli.dashboard.paint_lists import alert_line
from miles_cli.dashboard.snapshot import Alert, RunSnapshot
from miles_cli.dashboard.text import hanging, rich_text
from miles_cli.dashboard.windows import Window, bindings


class AlertsWindow(Window):
    """Open alerts first, then those that cleared; below, the evidence of the chosen one."""

    SCOPE, HEADING = ALERTS, "alerts"
    BINDINGS = bindings(LIST, ALERTS)
    DEFAULT_CSS = "AlertsWindow OptionList { height: auto; max-height: 40%; margin-bottom: 1; }"

    def __init__(self, run: RunSnapshot) -> None:
        super().__init__()
        cleared = sorted((a for a in run.alerts if a.cleared), key=lambda a: -a.time)
        self._alerts = [*run.open_alerts, *cleared]

    def body(self) -> ComposeResult:
        scene = self.watch_app.scene
        rows = [Option(rich_text([alert_line(alert, scene)])) for alert in self._alerts]
        if not rows:
            yield Static(rich_text([[(" nothing has fired so far", "axis")]]))
            return
        yield OptionList(*rows, id="alerts")
        with VerticalScroll():
            yield Static(hanging(evidence_lines(self._alerts[0]), 1), id="evidence")

    @property
    def chosen(self) -> Alert | None:
        at = self.query_one(OptionList).highlighted if self._alerts else None
        return None if at is None else self._alerts[at]

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        alert = self._alerts[event.option_index]
        self.query_one("#evidence", Static).update(hanging(evidence_lines(alert), 1))

    def on_option_list_option_selected(self) -> None:
        self.action_show_fix()

    def action_show_fix(self) -> None:
        if self.chosen is not None:
            self.app.push_screen(FixWindow(self.chosen, self.watch_app.scene.run))

    def action_goto_step(self) -> None:
        alert = self.chosen
        self.dismiss(None)
        if alert is not None and alert.step is not None:
            self.watch_app.inspect(alert.step)


def evidence_lines(alert: Alert) -> list[Line]:
    """Cause, observations with their numbers, and what can be done."""
    record = alert.record
    lines: list[Line] = [[(alert.rule, alert.severity), ("  ", ""), (alert.title, "strong")]]
    since = record.get("since")
    when = "" if since is None else f" since step {since}"
    over = f", cleared at step {alert.cleared_step}" if alert.cleared else ""
    lines.append([(f"{alert.severity}{when}{over}", "axis")])
    if record.get("cause"):
        lines += [[], [("cause     ", "axis"), (str(record["cause"]), "label")]]
    lines.append([])
    for seen in record.get("evidence", ()):
        lines.append([("evidence  ", "axis"), (seen["text"], "label")])
        if seen.get("metric"):
            points = "  ".join(f"{step}: {number(value)}" for step, value in seen.get("points", ())[-8:])
            lines.append([("          ", ""), (f"{seen['metric']}  ", "value"), (points, "axis")])
    for remedy in fixes.remedies(alert):
        lines += [[], [("fix       ", "axis"), (remedy.text, "label"), (f"  [{remedy.kind}]", "key")]]
    return lines
