"""The sample browser: what the policy was asked, what it wrote, and what that earned."""

from __future__ import annotations

import json
from typing import Any

from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from miles.record import RunReader
from miles_cli.dashboard.actions import LIST, SAMPLES
from miles_cli.dashboard.canvas import Line
from miles_cli.dashboard.feed import sample_steps
from miles_cli.dashboard.numbers import number
from miles_cli.dashboard.panels import passes
from miles_cli.dashboard.text import hanging, rich_text
from miles_cli.dashboard.windows import Window, bindings

_LONG = frozenset({"tokens", "loss_mask", "rollout_log_probs", "prompt", "response", "label", "attempt"})
"""Fields that are shown in another way, or only as a length."""


class SamplesWindow(Window):
    """Samples of one step on the left, the chosen one in full on the right."""

    SCOPE, HEADING = SAMPLES, "samples"
    BINDINGS = bindings(LIST, SAMPLES)
    DEFAULT_CSS = """
    SamplesWindow OptionList { height: auto; max-height: 35%; margin-bottom: 1; }
    """

    class Loaded(Message):
        """Samples of one step have been read."""

        def __init__(self, step: int | None, samples: list[dict[str, Any]], steps: list[int]) -> None:
            super().__init__()
            self.step, self.samples, self.steps = step, samples, steps

    def __init__(self, run_dir: str, step: int | None) -> None:
        super().__init__()
        self._run_dir, self._wanted = run_dir, step
        self._steps: list[int] = []
        self._step: int | None = None
        self._all: list[dict[str, Any]] = []
        self._shown: list[dict[str, Any]] = []

    def body(self) -> ComposeResult:
        yield Input(placeholder="filter: words, or ! and words", id="filter", classes="hidden")
        yield OptionList(id="samples")
        with VerticalScroll():
            yield Static("reading", id="sample")

    def on_mount(self) -> None:
        self.query_one(OptionList).focus()
        self._load(self._wanted)

    @work(thread=True, exclusive=True)
    def _load(self, wanted: int | None) -> None:
        """Read the samples of the step nearest below `wanted` (None: the newest)."""
        steps = sample_steps(self._run_dir)
        before = [s for s in steps if wanted is None or s <= wanted] or steps[:1]
        step = before[-1] if before else None
        samples = [] if step is None else RunReader(self._run_dir, read=False).samples(step)
        self.post_message(self.Loaded(step, samples, steps))

    def on_samples_window_loaded(self, event: Loaded) -> None:
        self._step, self._all, self._steps = event.step, event.samples, event.steps
        self._fill(self.query_one(Input).value)

    def _fill(self, query: str) -> None:
        self._shown = [s for s in self._all if passes(json.dumps(s, default=str), query)]
        rows = self.query_one(OptionList)
        rows.clear_options()
        rows.add_options([Option(rich_text([row_of(sample)])) for sample in self._shown])
        where = "no samples kept" if self._step is None else f"samples of step {self._step}"
        mean = _mean_reward(self._shown)
        told = "" if mean is None else f", mean reward {number(mean)}"
        self.query_one("#window").border_title = f"{where}: {len(self._shown)} of {len(self._all)}{told}"
        if self._shown:
            rows.highlighted = 0
        else:
            self.query_one("#sample", Static).update("nothing to show")

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        self.query_one("#sample", Static).update(hanging(sample_lines(self._shown[event.option_index]), 1))

    def action_next_sample(self) -> None:
        self.query_one(OptionList).action_cursor_down()

    def action_previous_sample(self) -> None:
        self.query_one(OptionList).action_cursor_up()

    def action_later_step(self) -> None:
        later = [s for s in self._steps if self._step is not None and s > self._step]
        if later:
            self._load(later[0])

    def action_earlier_step(self) -> None:
        earlier = [s for s in self._steps if self._step is not None and s < self._step]
        if earlier:
            self._load(earlier[-1])

    def action_filter_samples(self) -> None:
        self.query_one(Input).remove_class("hidden")
        self.query_one(Input).focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._fill(event.value)

    def on_input_submitted(self) -> None:
        self.query_one(OptionList).focus()


def _mean_reward(samples: list[dict[str, Any]]) -> float | None:
    rewards = [reward for s in samples if isinstance(reward := s.get("reward"), int | float)]
    return sum(rewards) / len(rewards) if rewards else None


def row_of(sample: dict[str, Any]) -> Line:
    reward = sample.get("reward")
    told = number(reward) if isinstance(reward, int | float) else str(reward)
    status = str(sample.get("status", ""))
    style = "good" if isinstance(reward, int | float) and reward > 0.5 else "warning"
    text = str(sample.get("response", "")).replace("\n", " ")
    return [
        (f" {sample.get('index', ''):>7} ", "axis"),
        (f"{told:>7} ", style),
        (f"{status:<10} ", "axis" if status == "completed" else "warning"),
        (text[:400], "label"),
    ]


def sample_lines(sample: dict[str, Any]) -> list[Line]:
    """Prompt, response and label in full, then every other field in one line each."""
    lines: list[Line] = []
    for name in ("prompt", "response", "label"):
        if name in sample:
            lines += [[(name, "title")], *_paragraph(sample[name]), []]
    for name, value in sample.items():
        if name not in _LONG and value not in (None, [], {}):
            lines.append([(f"{name:<20}", "axis"), (str(value)[:300], "label")])
    if "tokens" in sample:
        lines.append([(f"{'tokens':<20}", "axis"), (str(len(sample["tokens"])), "label")])
    return lines


def _paragraph(value: Any) -> list[Line]:
    if isinstance(value, list):
        turns: list[Line] = []
        for turn in value:
            turns.append([(f"  {turn.get('role', '?')}: ", "key"), (str(turn.get("content", "")), "label")])
        return turns
    return [[("  ", ""), (row, "label")] for row in str(value).splitlines() or [""]]
