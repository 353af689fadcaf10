"""The form, driven by keys: answers change the run beside them, and nothing is written without a word."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from e2e_support import PATIENCE_S
from textual.containers import VerticalScroll
from textual.events import DescendantFocus
from textual.pilot import Pilot
from textual.widgets import Static

from miles.config import resolve
from miles_cli.dashboard.symbols import LADDER
from miles_cli.init.form import InitForm, WriteAnyway
from miles_cli.init.interview import Interview
from miles_cli.init.preview import Preview
from miles_cli.init.questions import Value
from miles_cli.init.session import Session
from miles_cli.init.suggest_data import reward_choices

Steps = Callable[[InitForm, "Pilot[dict[str, Value]]"], Awaitable[None]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory, its own cache, a quiet shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILES_CACHE_DIR", str(cache))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # The pilot asks in slices of 20 ms whether the program is idle.
    monkeypatch.setattr("textual._wait.SLEEP_GRANULARITY", 0.004)
    monkeypatch.setattr("textual._wait.SLEEP_IDLE", 0.0004)


def form(steps: Steps, given: dict[str, Value] | None = None, size: tuple[int, int] = (80, 24)) -> InitForm:
    """The form after some steps, begun when the first look has settled."""

    async def drive() -> InitForm:
        app = InitForm(Session(Path("run.toml"), False, False, True), given or {}, LADDER["ascii"])
        async with app.run_test(size=size) as pilot:
            await settled(app, pilot)
            await steps(app, pilot)
        return app

    return asyncio.run(drive())


async def until(pilot: Pilot[dict[str, Value]], condition: Callable[[], bool], otherwise: str) -> None:
    """Wait for something that the form does meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        await pilot.pause(0.02)
        if condition():
            return
        assert time.monotonic() < deadline, otherwise


async def settled(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
    """Wait until what is shown belongs to the answers as they are."""
    await until(pilot, lambda: app.is_settled and app.focused is not None, "the form did not settle")


async def type_into(app: InitForm, pilot: Pilot[dict[str, Value]], question: str, text: str) -> None:
    """Replace the text of a field by keys."""
    await empty(app, pilot, question)
    await pilot.press(*text)
    await settled(app, pilot)


async def empty(app: InitForm, pilot: Pilot[dict[str, Value]], question: str) -> None:
    """Delete the text of a field; Textual handles such a key after a letter that follows at once."""
    app.rows[question].field.focus()
    await pilot.press("end", "ctrl+u")
    await until(pilot, lambda: app.rows[question].text == "", "the field was not emptied")


def head(app: InitForm) -> str:
    return str(app.query_one("#head", Static).render())


def seen(app: InitForm) -> str:
    """The text of the right-hand side."""
    side = app.query_one("#seen", Static)
    return "\n".join(side.render_line(y).text for y in range(side.size.height))


def test_it_opens_with_every_suggestion_and_the_run_that_they_make() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        assert "ok ready" in head(app)
        assert app.rows["profile"].text == "quickstart"
        assert not app.rows["address"].display and not app.rows["custom_rm_path"].display
        assert "80 steps of 256 samples" in seen(app)
        assert "Memory: " in seen(app) and "activations" in seen(app)
        assert app.focused is app.rows["hf_checkpoint"].field

    form(steps)


def test_a_typed_answer_changes_the_plan_and_what_follows_from_it() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await type_into(app, pilot, "n_samples_per_prompt", "4")
        assert "80 steps of 128 samples" in seen(app)
        assert app.rows["n_samples_per_prompt"].state == "given"
        await pilot.press("ctrl+r")
        await settled(app, pilot)
        assert "80 steps of 256 samples" in seen(app)
        assert app.rows["n_samples_per_prompt"].text == "8"
        assert app.given == {}

    form(steps)


def test_what_is_no_answer_is_said_at_once_and_not_written() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await type_into(app, pilot, "lr", "fast")
        assert app.rows["lr"].state == "wrong"
        assert "not an answer" in head(app)
        assert "'fast' is not a number" in str(app.query_one("#help", Static).render())
        await pilot.press("ctrl+s")
        assert app.is_running
        await type_into(app, pilot, "lr", "1e-4")
        assert "ready" in head(app)

    form(steps)


def test_choices_turn_and_bring_new_questions() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        app.rows["rm_type"].field.focus()
        await pilot.press("c")
        await settled(app, pilot)
        assert app.given["rm_type"] == "custom"
        assert app.rows["custom_rm_path"].display
        assert "1 open" in head(app)
        await pilot.press("ctrl+s")
        assert app.focused is app.rows["custom_rm_path"].field
        app.rows["rm_type"].field.focus()
        await pilot.press("left")
        await settled(app, pilot)
        rewards = reward_choices()
        assert app.given["rm_type"] == rewards[rewards.index("custom") - 1]

    form(steps)


def test_a_checkpoint_that_is_not_there_is_refused_in_the_form() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await type_into(app, pilot, "hf_checkpoint", "nowhere")
        assert "MOD1" in seen(app) and "nowhere is not a directory" in seen(app)
        assert app.rows["prompt_data"].state == "missing"
        assert "DAT1" not in seen(app)

    form(steps)


def test_errors_block_writing_until_the_user_says_so() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await type_into(app, pilot, "rollout_max_response_len", "2000")
        assert "CTX1" in seen(app) and "would be refused" in head(app)
        await pilot.press("ctrl+s")
        assert isinstance(app.screen, WriteAnyway)
        await pilot.press("n")
        assert app.is_running and not isinstance(app.screen, WriteAnyway)
        await pilot.press("ctrl+s")
        await pilot.press("escape")
        assert app.is_running and not isinstance(app.screen, WriteAnyway)
        await pilot.press("ctrl+s")
        await pilot.press("y")

    app = form(steps)
    assert app.return_value == {"rollout_max_response_len": 2000}
    assert app.session.write_anyway


def test_writing_ends_the_form_with_the_answers_of_the_user(tmp_path: Path) -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await type_into(app, pilot, "num_rollout", "3")
        await pilot.press("ctrl+s")

    app = form(steps)
    assert app.return_value == {"num_rollout": 3}
    assert not (tmp_path / "run.toml").exists()
    app.session.finish(app.return_value, report=False)
    assert resolve(run_file=tmp_path / "run.toml").config.rollout.num_rollout == 3


@pytest.mark.parametrize(("key", "given"), [("3", {"num_rollout": 3}), ("ctrl+r", {})])
def test_a_wish_to_write_waits_for_the_plan(key: str, given: dict[str, Value]) -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await empty(app, pilot, "num_rollout")
        await settled(app, pilot)
        may_look, preview = threading.Event(), app.session.preview

        def when_told(interview: Interview) -> Preview:
            assert may_look.wait(600)
            return preview(interview)

        app.session.preview = when_told  # type: ignore[method-assign]
        await pilot.press(key, "ctrl+s")
        assert not app.is_settled and app.is_running
        may_look.set()
        await until(pilot, lambda: app.return_value is not None, "nothing was written")

    assert form(steps).return_value == given


def test_an_answer_typed_during_a_look_is_not_overwritten_by_it() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await empty(app, pilot, "num_rollout")
        before = app.session.preview(app.session.hold({}))
        await pilot.press("3")
        app._show(before, None)
        assert app.rows["num_rollout"].text == "3"
        await pilot.press("0")
        await settled(app, pilot)
        assert app.rows["num_rollout"].text == "30" and "30 steps" in seen(app)

    form(steps)


@pytest.mark.parametrize(
    "key", ["escape", *(pytest.param(key, marks=pytest.mark.slow) for key in ("ctrl+q", "ctrl+c"))]
)
def test_leaving_gives_no_answers(key: str) -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await pilot.press(key)

    app = form(steps)
    assert app.return_value is None and app.return_code == 0


def test_leaving_does_not_wait_for_a_look_that_is_under_way() -> None:
    async def leave_at_once() -> InitForm:
        app = InitForm(Session(Path("run.toml"), False, False, True), {})
        async with app.run_test() as pilot:
            await pilot.press("escape")
        return app

    app = asyncio.run(leave_at_once())
    assert app.return_value is None and app.return_code == 0


def test_a_focus_that_is_told_after_the_screen_is_gone_changes_nothing() -> None:
    app = form(steps=settled)
    assert not app.screen_stack
    app.on_descendant_focus(DescendantFocus(app.rows["lr"].field))


def test_the_file_can_be_read_before_it_is_written() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        await pilot.press("ctrl+t")
        await pilot.pause()
        assert 'extends = ["quickstart"]' in seen(app)
        side = app.query_one("#panel", VerticalScroll)
        await pilot.press("pagedown")
        await pilot.pause()
        assert side.scroll_y > 0
        await pilot.press("ctrl+t")
        await pilot.pause()
        assert "Plan" in seen(app) and side.scroll_y == 0

    form(steps)


def test_flags_are_answers_already() -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        assert app.rows["lr"].state == "given" and app.rows["lr"].text == "2e-4"

    form(steps, {"lr": 2e-4})


@pytest.mark.parametrize(
    "size", [(80, 24), *(pytest.param(size, marks=pytest.mark.slow) for size in ((120, 40), (200, 60)))]
)
def test_every_question_can_be_reached_and_seen(size: tuple[int, int]) -> None:
    async def steps(app: InitForm, pilot: Pilot[dict[str, Value]]) -> None:
        shown = [row for row in app.rows.values() if row.display]
        for row in shown:
            assert app.focused is row.field
            await pilot.pause()
            assert app.query_one("#questions").region.contains_region(row.field.region)
            await pilot.press("tab")

    form(steps, size=size)
