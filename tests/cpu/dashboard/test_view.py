"""What the keys change: panels, filters, windows of steps, the inspected step, several runs."""

from __future__ import annotations

from dataclasses import replace

from miles_cli.dashboard.panels import PANELS, PRESETS, STAND_INS, matching, natural, passes, presets_of
from miles_cli.dashboard.scene import Scene
from miles_cli.dashboard.screenful import compose
from miles_cli.dashboard.symbols import BRAILLE
from miles_cli.dashboard.view import View
from tests.cpu.dashboard.frames import PPO_RUN, snapshot


def text(scene: Scene, width: int = 120, height: int = 40) -> str:
    lines = compose(scene, width, height).lines
    return "\n".join("".join(part for part, _ in line) for line in lines)


def test_presets_name_panels_that_exist_nine_each() -> None:
    for names in PRESETS.values():
        assert len(names) == len(set(names)) == 9
        assert all(name in PANELS for name in names)
    for (preset, panel), other in STAND_INS.items():
        assert panel in PRESETS[preset] and other in PANELS and other not in PRESETS[preset]


def test_a_number_key_hides_a_panel_and_brings_it_back(scene: Scene) -> None:
    run = scene.run
    assert [n for n, _ in View().shown(run, 4)] == [1, 2, 3, 4]
    hidden = View().toggle(2, run, 4)
    assert [n for n, _ in hidden.shown(run, 4)] == [1, 3, 4, 5]
    assert [n for n, _ in hidden.toggle(2, run, 4).shown(run, 4)] == [1, 2, 3, 4]
    assert 9 in [n for n, _ in View().toggle(9, run, 4).shown(run, 4)]


def test_a_choice_of_panels_belongs_to_its_preset(scene: Scene) -> None:
    view = View().toggle(1, scene.run, 6).next_preset(scene.run)
    assert [n for n, _ in view.shown(scene.run, 6)] == [1, 2, 3, 4, 5, 6]


def test_filter_words_and_their_inverse() -> None:
    assert passes("route/flip_frac/layer_2", "flip LAYER")
    assert not passes("route/flip_frac", "flip layer")
    assert passes("train/loss", "!flip")
    assert not passes("route/flip_frac", "!flip")
    assert passes("anything", "")


def test_a_filter_shows_the_metrics_it_matches(scene: Scene) -> None:
    shown = text(replace(scene, view=View(query="flip layer")))
    assert all(f"route/flip_frac/layer_{i}" in shown for i in range(4))
    assert "log-prob gap" not in shown.splitlines()[3]


def test_layers_are_in_numeric_order() -> None:
    names = [f"route/flip_frac/layer_{i}" for i in (10, 9, 2)]
    assert matching(["route/flip_frac/layer_*"], names) == sorted(names, key=natural) == names[::-1]


def test_an_unhealthy_value_is_told_by_a_sign_and_in_words(scene: Scene) -> None:
    shown = text(scene)
    assert "log-prob gap ✗ 0.0411" in shown
    assert "healthy 0 – 0.03" in shown
    assert "entropy  0.187" in shown


def test_an_inspected_step_shows_the_values_of_that_step(scene: Scene) -> None:
    shown = text(replace(scene, view=View(cursor=87), frozen=True))
    assert "grad norm ✗ NaN" in shown
    assert "replay step 87 of 120" in shown


def test_a_dense_run_says_why_the_moe_panels_are_empty(scene: Scene) -> None:
    dense = replace(
        scene.run, tracks={n: t for n, t in scene.run.tracks.items() if not n.startswith("route/")}
    )
    shown = text(replace(scene, runs=(dense,), view=View(preset="moe")))
    assert "a dense model has no routes" in shown


def test_a_run_with_a_critic_has_panels_of_it_and_other_runs_are_not_told_of_one(scene: Scene) -> None:
    grpo, ppo = scene.run, snapshot(PPO_RUN)
    assert "variance explained" in text(replace(scene, runs=(ppo,)))
    assert "variance explained" not in text(scene) and "routing flips" in text(scene)
    seen, view = [], View()
    for _ in PRESETS:
        view = view.next_preset(ppo)
        seen.append(view.preset)
    assert sorted(seen) == sorted(PRESETS) and len(presets_of(grpo.tracks)) == len(PRESETS) - 1
    assert View(preset="critic").next_preset(grpo).preset == "overview"


def test_several_runs_share_a_chart_with_a_glyph_each(scene: Scene) -> None:
    other = replace(scene.run, name="other", run_id="other")
    shown = text(replace(scene, runs=(scene.run, other), current=1))
    assert f"{BRAILLE.runs[0]} sort-moe" in shown
    assert f"[{BRAILLE.runs[1]} other]" in shown
    assert f"{BRAILLE.runs[0]} 0.0411  {BRAILLE.runs[1]} 0.0411" in shown


def test_a_window_of_steps_ends_at_the_newest_or_around_the_inspected_one(scene: Scene) -> None:
    assert View(window=50).span(scene.runs) == (70, 120)
    assert View(window=50, cursor=60).span(scene.runs) == (10, 60)
    assert View().span(scene.runs) == (0, 120)


def test_zoom_explains_the_metric(scene: Scene) -> None:
    shown = text(replace(scene, view=View(focus=1, mode="full")))
    assert "mean |trainer log-prob - engine log-prob| of the sampled tokens" in shown
    assert "kernels, precision, stale weights" in shown


def test_a_phase_that_lasts_too_long_is_told(scene: Scene) -> None:
    from miles.record import RunStatus
    from miles_cli.dashboard.snapshot import OpenPhase
    from miles_cli.dashboard.strip import header, liveness

    phase = OpenPhase("rollout", 121, "driver", scene.now - 9.0)
    live = replace(scene.run, status=RunStatus.RUNNING, open_phases=(phase,))
    told = "".join(part for part, _ in header(replace(scene, runs=(live,)), 120)[1])
    assert f"{BRAILLE.critical} rollout 9.0s (usually 0.6s)" in told
    silent = replace(scene, runs=(live,), now=scene.now + 600)
    assert liveness(silent)[2] == "silent"


def test_panels_with_nothing_to_show_make_room(scene: Scene) -> None:
    run = replace(scene.run, tracks={n: t for n, t in scene.run.tracks.items() if "entropy" not in n})
    assert [n for n, _ in View().shown(run, 6)] == [1, 2, 4, 5, 6, 7]
    assert [n for n, _ in View().shown(run, 9)] == list(range(1, 10))
