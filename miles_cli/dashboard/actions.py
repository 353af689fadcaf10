"""Every action of the dashboard, once: bindings, help, palette, footer and the keys page read this table."""

from __future__ import annotations

from dataclasses import dataclass

BOARD, LIST, ALERTS, FIX, SAMPLES, LOGS, CONFIRM = (
    "board", "list", "alerts", "fix", "samples", "logs", "confirm",
)  # fmt: skip

SCOPES = {
    BOARD: "On the board",
    LIST: "In every window opened from the board",
    ALERTS: "In the alerts window",
    FIX: "In the fix window",
    SAMPLES: "In the sample browser",
    LOGS: "In the log window",
    CONFIRM: "Where a question is asked",
}
"""Scopes in the order of the documentation, with their headings."""


@dataclass(frozen=True)
class Action:
    """One thing to do: `argument` goes to the handler `action_<id>`, `footer` is its word in the last row."""

    id: str
    keys: tuple[str, ...]
    title: str
    tooltip: str
    scope: str = BOARD
    argument: str = ""
    footer: str = ""

    @property
    def handler(self) -> str:
        return f"{self.id}({self.argument!r})" if self.argument else self.id

    @property
    def shown_keys(self) -> str:
        return " ".join(_SHOWN.get(key, key) for key in self.keys)


_SHOWN = {
    "question_mark": "?",
    "colon": ":",
    "slash": "/",
    "comma": ",",
    "full_stop": ".",
    "less_than_sign": "<",
    "greater_than_sign": ">",
    "plus": "+",
    "underscore": "_",
    "left_square_bracket": "[",
    "right_square_bracket": "]",
}

ACTIONS: tuple[Action, ...] = (
    Action("help", ("question_mark",), "Keys", "The keys that work here, with what they do.", footer="keys"),
    Action(
        "palette",
        ("colon", "ctrl+p"),
        "Command line",
        "Type an action, a metric (`grad_norm`, `layer 17`), a preset or a run.",
        footer="command",
    ),
    *(
        Action(
            "toggle_panel", (str(n),), f"Panel {n}", f"Show or hide panel {n} of the preset.", argument=str(n)
        )
        for n in range(1, 10)
    ),
    Action(
        "next_preset",
        ("p",),
        "Next preset",
        "Overview, numerics, critic (of a PPO run), MoE, precision, throughput, incident.",
        footer="preset",
    ),
    Action("focus_next_panel", ("tab", "right", "down"), "Next panel", "Move the focus on."),
    Action("focus_previous_panel", ("shift+tab", "left", "up"), "Previous panel", "Move the focus back."),
    Action(
        "zoom",
        ("enter", "z"),
        "Zoom",
        "The focused panel on the whole board, with what its metric means; again to go back.",
        footer="zoom",
    ),
    Action("larger", ("plus",), "Larger", "Focused panel: normal, half, full."),
    Action("smaller", ("underscore",), "Smaller", "Focused panel: full, half, normal."),
    Action("page_down", ("pagedown",), "Next page", "More panels of a filter that matches many metrics."),
    Action("page_up", ("pageup",), "Previous page", "Back to the panels before."),
    Action(
        "freeze",
        ("space",),
        "Freeze",
        "Hold the view; collection goes on. A banner says how far behind live it is.",
        footer="freeze",
    ),
    Action("live", ("end",), "Live", "Let go of the frozen or inspected step and follow the run."),
    Action("scrub_back", ("comma",), "Step back", "Inspect the step before; what came later is faded."),
    Action("scrub_forward", ("full_stop",), "Step forward", "Inspect the next step."),
    Action("alert_back", ("less_than_sign",), "Previous alert", "Inspect the step of the alert before."),
    Action("alert_forward", ("greater_than_sign",), "Next alert", "Inspect the step of the next alert."),
    Action("first_step", ("home",), "First step", "Inspect the first step."),
    Action(
        "filter",
        ("slash",),
        "Filter",
        "Show the metrics whose name has every word; `!` first shows the others. Escape clears.",
        footer="filter",
    ),
    Action("toggle_log", ("l",), "Log scale", "Logarithmic vertical scale."),
    Action("toggle_average", ("e",), "Average", "Moving average over the dim band, or the mean alone."),
    Action("toggle_shared", ("s",), "Shared inspector", "Show the inspected step in every chart, or in one."),
    Action("next_window", ("x",), "Window", "All steps, or the last 1000, 200 or 50."),
    Action("explain", ("i",), "Explain", "What the focused metric means, its healthy range, what moves it."),
    Action("alerts", ("a",), "Alerts", "Every alert with its evidence.", footer="alerts"),
    Action("fix", ("f",), "Fix", "The fix of the worst alert, as a change of the run file.", footer="fix"),
    Action("samples", ("w",), "Samples", "What the policy wrote, with its rewards.", footer="samples"),
    Action("logs", ("o",), "Log", "Events and the workers' logs, merged by time."),
    Action("next_run", ("right_square_bracket",), "Next run", "Bring the next run to the front."),
    Action("previous_run", ("left_square_bracket",), "Previous run", "Bring the run before to the front."),
    Action("save_now", ("S",), "Save now", "Ask the run for a checkpoint at the next step boundary."),
    Action("stop_run", ("X",), "Stop the run", "Ask the run to finish the step, save and stop. Asks first."),
    Action("step_out", ("escape",), "Back", "Undo one level: zoom, filter, inspected step."),
    Action("suspend_process", ("ctrl+z",), "Suspend", "To the shell; `fg` comes back."),
    Action(
        "quit", ("q", "ctrl+c"), "Quit", "Leave. The run goes on; a summary stays in the terminal.",
        footer="quit",
    ),
    Action("dismiss", ("escape", "q"), "Close", "Back to where you came from.", LIST),
    Action("show_fix", ("f", "enter"), "Fix", "What mends it, as a patch.", ALERTS, footer="fix"),
    Action("goto_step", ("g",), "Go to its step", "Inspect the step it fired at.", ALERTS, footer="go there"),
    Action("next_fix", ("n",), "Next fix", "Another way to mend it.", FIX, footer="next"),
    Action("previous_fix", ("b",), "Previous fix", "The way before.", FIX),
    Action(
        "apply", ("enter",), "Apply",
        "A live fix changes the running run; others stop it and go on from a checkpoint, or start anew.",
        FIX, footer="apply",
    ),
    Action("copy", ("y",), "Copy", "Copy the command to the clipboard.", FIX, footer="copy command"),
    Action("next_sample", ("n", "right"), "Next sample", "The next of this step.", SAMPLES, footer="next"),
    Action("previous_sample", ("b", "left"), "Previous sample", "The sample before.", SAMPLES),
    Action("later_step", ("full_stop",), "Later step", "The next step with samples.", SAMPLES, footer="step"),
    Action("earlier_step", ("comma",), "Earlier step", "The step with samples before.", SAMPLES),
    Action(
        "filter_samples", ("slash",), "Filter", "Samples that have every word; `!` first excludes.",
        SAMPLES, footer="filter",
    ),
    Action(
        "filter_logs", ("slash",), "Filter", "Lines that have every word; `!` first excludes.",
        LOGS, footer="filter",
    ),
    Action("yes", ("enter", "y"), "Yes", "Do it.", CONFIRM, footer="yes"),
    Action("toggle_tail", ("t",), "Tail", "Follow the end, or stay.", LOGS, footer="tail"),
)  # fmt: skip


def actions_of(*scopes: str) -> list[Action]:
    return [action for action in ACTIONS if action.scope in scopes]


def key_rows(scope: str) -> list[tuple[str, str, str]]:
    """(keys, title, tooltip) of each action of a scope; an action with arguments is one row."""
    rows: dict[str, list[Action]] = {}
    for action in actions_of(scope):
        rows.setdefault(action.id, []).append(action)
    return [
        (members[0].shown_keys, members[0].title, members[0].tooltip)
        if len(members) == 1
        else (
            f"{members[0].shown_keys} to {members[-1].shown_keys}",
            members[0].title.rpartition(" ")[0],
            members[0].tooltip.replace(f" {members[0].argument} ", " "),
        )
        for members in rows.values()
    ]
