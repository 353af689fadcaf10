"""A fix as a difference of the run file, as a command, and as a way to apply it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from frames import RUN

from miles.record import RunStatus
from miles_cli.dashboard.fixes import (
    LIVE,
    MANUAL,
    RESUME,
    Remedy,
    command,
    difference,
    present_remedies,
    remedies,
    way,
)
from miles_cli.dashboard.scene import Scene


def plain(lines: list[list[tuple[str, str]]]) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


def lower_lr(**options: object) -> Remedy:
    return Remedy("lower lr", RESUME, "slower", {"optimizer.lr": 0.0001}, **options)  # type: ignore[arg-type]


def test_the_difference_is_in_the_words_of_the_run_file(scene: Scene) -> None:
    remedy = Remedy("", RESUME, "", {"optimizer.lr": 0.0001, "correction.use_tis": True, "run.seed": None})
    assert plain(difference(remedy, scene.run.config)) == [
        "  [optimizer]",
        "- lr = 0.0004",
        "+ lr = 0.0001",
        "  [correction]",
        "+ use_tis = true",
        "  [run]",
        "- seed = 1234",
        "+ # seed: back to its default",
    ]


def test_the_command_does_the_same(scene: Scene) -> None:
    run, name = scene.run, "dashboard_run"
    assert command(lower_lr(from_step=80), run) == (
        f"miles runs resume {name} --from-step 80 --set optimizer.lr=0.0001"
    )
    going_on = replace(run, status=RunStatus.RUNNING)
    assert command(lower_lr(), going_on) == f"miles runs resume {name} --stop --set optimizer.lr=0.0001"
    live = Remedy("", LIVE, "", {"optimizer.lr": 0.0001})
    assert command(live, going_on) == f"miles runs set {name} optimizer.lr=0.0001"
    back = Remedy("", RESUME, "", {"correction.tis_clip": None})
    assert command(back, run) == f"miles runs resume {name} --set correction.tis_clip=default"
    assert command(lower_lr(start_over=True), run) == f"miles train --parent {name} --set optimizer.lr=0.0001"
    assert command(Remedy("look at it", MANUAL, "", {}), run) is None


def test_a_run_outside_of_the_runs_directory_is_named_by_its_path(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MILES_RUNS_DIR", str(tmp_path))
    assert command(lower_lr(), scene.run) == f"miles runs resume {RUN} --set optimizer.lr=0.0001"


def test_how_it_is_applied_depends_on_whether_the_run_lives(scene: Scene) -> None:
    live = replace(scene.run, status=RunStatus.RUNNING)
    patch = {"optimizer.lr": 0.0001}
    assert "next step boundary" in way(Remedy("", LIVE, "", patch), live)
    assert way(lower_lr(), live).startswith("stops the run")
    assert way(lower_lr(from_step=80), scene.run) == "the next attempt goes on from the checkpoint of step 80"
    assert way(Remedy("", MANUAL, "", {}), live) == "something that only you can do"


def test_fixes_are_those_of_the_run_as_it_stands_now(scene: Scene) -> None:
    alert = scene.run.open_alerts[0]
    stale = replace(
        alert, record={**alert.record, "fixes": [{"text": "x", "kind": LIVE, "patch": {"a.b": 1}}]}
    )
    assert [r.text for r in remedies(stale)] == ["x"]
    assert present_remedies(stale, RUN) == present_remedies(alert, RUN) != []
    assert [r.text for r in present_remedies(replace(stale, rule="NO1"), RUN)] == ["x"]


def test_fixes_that_change_the_configuration_come_first(scene: Scene) -> None:
    found = remedies(scene.run.open_alerts[0])
    assert [r.changes_config for r in found] == sorted((r.changes_config for r in found), reverse=True)
    assert found[0].patch == {"correction.use_tis": True}
