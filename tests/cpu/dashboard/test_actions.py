"""One table of actions: bindings, help, palette, footer and the keys page say the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from miles_cli.dashboard.actions import (
    ACTIONS,
    ALERTS,
    BOARD,
    CONFIRM,
    FIX,
    LIST,
    LOGS,
    SAMPLES,
    SCOPES,
    actions_of,
)
from miles_cli.dashboard.alerts_window import AlertsWindow, FixWindow
from miles_cli.dashboard.logs_window import LogWindow
from miles_cli.dashboard.reference import keys_page
from miles_cli.dashboard.samples_window import SamplesWindow
from miles_cli.dashboard.screenful import footer
from miles_cli.dashboard.watch_app import WatchApp
from miles_cli.dashboard.windows import ConfirmWindow, Window, keys_lines

OWNERS = {
    BOARD: WatchApp,
    LIST: Window,
    ALERTS: AlertsWindow,
    FIX: FixWindow,
    SAMPLES: SamplesWindow,
    LOGS: LogWindow,
    CONFIRM: ConfirmWindow,
}


@pytest.mark.parametrize("action", ACTIONS, ids=lambda a: f"{a.scope}-{a.handler}")
def test_every_action_has_a_handler_and_a_binding(action) -> None:  # type: ignore[no-untyped-def]
    owner = OWNERS[action.scope]
    assert hasattr(owner, f"action_{action.id}")
    owners = [WatchApp] if action.scope == BOARD else [w for s, w in OWNERS.items() if s not in (BOARD, LIST)]
    for bound in owners if action.scope in (BOARD, LIST) else [owner]:
        keys = {key for binding in bound.BINDINGS for key in binding.key.split(",")}
        assert set(action.keys) <= keys


def test_no_key_means_two_things_in_one_place() -> None:
    for scope in SCOPES:
        keys = [key for action in actions_of(*{scope, LIST} - {BOARD}) for key in action.keys]
        if scope == BOARD:
            keys = [key for action in actions_of(BOARD) for key in action.keys]
        assert [key for key, n in Counter(keys).items() if n > 1] == []


def test_the_keys_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "keys.md"
    assert page.read_text() == keys_page(), "write it anew with: make docs"


def test_help_and_page_name_every_action() -> None:
    shown = "\n".join("".join(text for text, _ in line) for line in keys_lines(*SCOPES))
    for action in ACTIONS:
        if not action.argument:
            assert action.title in shown
            assert action.tooltip in shown
            assert f"| {action.title} | {action.tooltip} |" in keys_page()


def test_the_footer_names_as_many_keys_as_fit() -> None:
    wide = "".join(text for text, _ in footer(200))
    assert all(a.footer in wide for a in actions_of(BOARD))
    assert len("".join(text for text, _ in footer(80))) == 80
