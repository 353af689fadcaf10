"""One panel, whatever its kind, in its box."""

from __future__ import annotations

from miles_cli.dashboard import panels
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.frame import frame
from miles_cli.dashboard.paint_chart import paint_chart
from miles_cli.dashboard.paint_lists import paint_alerts, paint_log, paint_phases, paint_workers
from miles_cli.dashboard.paint_map import paint_bars, paint_heatmap
from miles_cli.dashboard.panels import Panel
from miles_cli.dashboard.scene import Painted, Scene

_KINDS = {
    panels.HEATMAP: paint_heatmap,
    panels.BARS: paint_bars,
    panels.PHASES: paint_phases,
    panels.WORKERS: paint_workers,
    panels.ALERTS: paint_alerts,
    panels.LOG: paint_log,
}


def paint_panel(
    panel: Panel, number: int, scene: Scene, width: int, height: int, focused: bool
) -> list[Line]:
    """`height` lines of `width` cells; `number` is the key that toggles the panel, 0 for none."""
    if width < 4 or height < 3:
        return [[(" " * width, "")]] * height
    return frame(_inside(panel, number, scene, width - 2, height - 2, focused), width, focused, scene.symbols)


def _inside(panel: Panel, number: int, scene: Scene, width: int, height: int, focused: bool) -> Painted:
    if panel.kind == panels.CHART:
        return paint_chart(panel, number, scene, width, height, focused)
    return _KINDS[panel.kind](panel, number, scene, width, height)
