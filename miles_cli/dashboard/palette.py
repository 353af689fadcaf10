"""What the command line knows: actions, presets, metrics and runs, from the same tables as the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider

from miles.record.metrics import find_metric
from miles_cli.dashboard.actions import BOARD, actions_of
from miles_cli.dashboard.panels import natural, presets_of

if TYPE_CHECKING:
    from miles_cli.dashboard.watch_app import WatchApp

_DISCOVERED = 40
"""Commands listed before anything is typed."""


@dataclass(frozen=True)
class Command:
    """One line of the palette."""

    title: str
    help: str
    run: Callable[[], object]


class DashboardCommands(Provider):
    """Every command that makes sense on the board."""

    def commands(self) -> Iterator[Command]:
        app = cast("WatchApp", self.app)
        for action in actions_of(BOARD):
            if action.id not in ("palette", "toggle_panel"):
                run = partial(app.run_action, action.handler)
                yield Command(f"{action.title} ({action.shown_keys})", action.tooltip, run)
        for preset in presets_of(app.scene.run.tracks):
            yield Command(f"preset {preset}", "show this group of panels", partial(app.show_preset, preset))
        for i, snapshot in enumerate(app.scene.runs if len(app.scene.runs) > 1 else ()):
            yield Command(f"run {snapshot.name}", snapshot.run_id, partial(app.show_run, i))
        for name in sorted(app.scene.run.tracks, key=natural):
            metric = find_metric(name)
            yield Command(f"metric {name}", metric.meaning if metric else "", partial(app.pin, name))

    async def discover(self) -> Hits:
        for i, command in enumerate(self.commands()):
            if i < _DISCOVERED:
                yield DiscoveryHit(command.title, command.run, help=command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query.replace("layer ", "layer_"))
        for command in self.commands():
            score = matcher.match(command.title)
            if score > 0:
                yield Hit(score, matcher.highlight(command.title), command.run, help=command.help)
