"""A run that goes on: new steps arrive, a frozen view stays, redraws are capped, requests reach the run."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from frames import settled, until

from miles.record import Inbox, RecordWriter, RunStatus
from miles_cli.dashboard.follower import INTERVAL
from miles_cli.dashboard.stage import Stage
from miles_cli.dashboard.symbols import BRAILLE
from miles_cli.dashboard.watch_app import WatchApp


def write_steps(run: Path, first: int, count: int) -> None:
    with RecordWriter(run, attempt=2, heartbeat_interval=3600) as writer:
        for step in range(first, first + count):
            writer.metrics(step, {"rollout/raw_reward": 0.5, "train/loss": 0.1})


def test_new_steps_appear_and_a_frozen_view_stays(live_run: Path) -> None:
    async def main() -> None:
        app = WatchApp([live_run], BRAILLE)
        async with app.run_test(size=(120, 40)) as pilot:
            await settled(pilot)
            assert app.scene.run.status is RunStatus.RUNNING
            await pilot.press("space")
            write_steps(live_run, 121, 5)
            await until(pilot, lambda: app.live_runs[0].step == 125)
            assert app.scene.run.step == 120
            shown = app.query_one(Stage).plain()
            assert "view frozen" in shown
            assert "5 steps behind live; collection goes on" in shown
            await pilot.press("end")
            assert app.scene.run.step == 125
            assert "frozen" not in app.query_one(Stage).plain()

    asyncio.run(main())


def test_a_flood_of_events_is_drawn_a_few_times_a_second(live_run: Path) -> None:
    async def main() -> tuple[int, float]:
        app = WatchApp([live_run], BRAILLE)
        async with app.run_test(size=(80, 24)) as pilot:
            await settled(pilot)
            stage = app.query_one(Stage)
            before, started = stage.repaints, time.monotonic()
            for burst in range(20):
                write_steps(live_run, 121 + 500 * burst, 500)
                await pilot.pause(0.01)
            await until(pilot, lambda: app.scene.run.step == 10_120)
            return stage.repaints - before, time.monotonic() - started

    repaints, seconds = asyncio.run(main())
    # The clock in the header redraws once a second besides.
    assert repaints <= seconds / INTERVAL + seconds + 2


def test_nothing_new_means_nothing_is_redrawn(live_run: Path) -> None:
    async def main() -> int:
        still = time.time()
        app = WatchApp([live_run], BRAILLE, clock=lambda: still)
        async with app.run_test(size=(120, 40)) as pilot:
            await settled(pilot)
            app.draw()
            before = app.query_one(Stage).repaints
            await pilot.pause(0.6)
            app.draw()
            return app.query_one(Stage).repaints - before

    assert asyncio.run(main()) == 0


def test_stop_asks_first_and_then_leaves_a_request(live_run: Path) -> None:
    async def main() -> None:
        app = WatchApp([live_run], BRAILLE)
        async with app.run_test(size=(120, 40)) as pilot:
            await settled(pilot)
            await pilot.press("X", "escape")
            assert list((live_run / "control").glob("*.json")) == []
            await pilot.press("X", "enter", "S")
            await pilot.pause()

    asyncio.run(main())
    with RecordWriter(live_run, attempt=2, heartbeat_interval=3600) as writer:
        assert [request.action for request in Inbox(writer).pending()] == ["stop", "save"]


def test_a_live_fix_goes_through_the_inbox(live_run: Path) -> None:
    fix = {
        "text": "lower the learning rate", "kind": "live", "risk": "learns more slowly",
        "patch": {"optimizer.lr": 0.0001},
    }  # fmt: skip
    with RecordWriter(live_run, attempt=2, heartbeat_interval=3600) as writer:
        writer.alert(rule="OP1", severity="critical", title="collapse", step=120, evidence=[], fixes=[fix])

    async def main() -> None:
        app = WatchApp([live_run], BRAILLE)
        async with app.run_test(size=(120, 40)) as pilot:
            await settled(pilot)
            await pilot.press("f", "enter")
            await pilot.pause()

    asyncio.run(main())
    with RecordWriter(live_run, attempt=2, heartbeat_interval=3600) as writer:
        (request,) = Inbox(writer).pending()
    assert (request.action, request.patch, request.by) == ("set", {"optimizer.lr": 0.0001}, "watch")
