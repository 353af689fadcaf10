"""The line chart as text: gaps and marks, healthy range, scales, every step of the symbol ladder."""

from __future__ import annotations

import math

import numpy as np
import pytest

from miles.record.metrics import Band
from miles_cli.dashboard.chart import GUTTER, Chart, Curve, Mark, draw_chart
from miles_cli.dashboard.resample import resample
from miles_cli.dashboard.scale import choose_scale
from miles_cli.dashboard.symbols import ASCII, BLOCK, BRAILLE, LADDER, Symbols, choose_symbols
from miles_cli.dashboard.track import Track, TrackView


def view_of(values: list[float] | np.ndarray) -> TrackView:
    track = Track()
    track.extend(np.arange(1, len(values) + 1), np.array(values, float))
    return track.view()


def drawn(view: TrackView, symbols: Symbols = BRAILLE, width: int = 60, **options: object) -> list[str]:
    chart = Chart((Curve(view),), view.first_step, view.last_step, **options)  # type: ignore[arg-type]
    lines = draw_chart(chart, width, 10, symbols).lines()
    return ["".join(text for text, _ in line) for line in lines]


def test_every_line_fills_the_width() -> None:
    assert {len(line) for line in drawn(view_of([1, 2, 3]))} == {60}


def test_a_nan_is_a_gap_with_a_mark() -> None:
    values = [1.0] * 100
    values[50] = math.nan
    rows = drawn(view_of(values))
    column = rows[-2].index(BRAILLE.nan)
    assert abs(column - (GUTTER + 26)) <= 1
    line = next(row for row in rows if row.count("⠤") + row.count("⠒") + row.count("⠉") > 10)
    assert line[column] in (" ", BRAILLE.nan) or ord(line[column]) in (0x2800 + 0x04, 0x2800 + 0x20)


def test_plus_infinity_is_marked_at_the_top_and_does_not_stretch_the_scale() -> None:
    values = [1.0, 2.0] * 20
    values[10] = math.inf
    rows = drawn(view_of(values))
    assert BRAILLE.plus_inf in rows[0]
    assert "inf" not in "".join(rows)


def test_the_healthy_range_is_drawn_and_labelled_without_colour() -> None:
    rows = drawn(view_of([0.0, 0.06]), healthy=Band(0, 0.03))
    assert any(BRAILLE.edge * 5 in row for row in rows)
    axis = [row[GUTTER - 1] for row in rows[:-1]]
    assert axis[0] == BRAILLE.axis
    assert axis[-1] == BRAILLE.axis_healthy


def test_a_healthy_bound_far_away_does_not_flatten_the_curve() -> None:
    scale = choose_scale(np.array([0.1]), np.array([0.2]), Band(None, 100.0), log=False)
    assert scale.high < 1


def test_one_spike_does_not_flatten_a_long_curve_but_stays_visible() -> None:
    values = np.ones(1000) + np.sin(np.arange(1000) / 50) * 0.2
    values[500] = 1000.0
    rows = drawn(view_of(values))
    assert float(rows[0][: GUTTER - 1]) < 2
    assert rows[0][GUTTER:].strip(" ") != ""


def test_a_rising_curve_is_not_cut_off_at_its_newest_values() -> None:
    rows = drawn(view_of(np.linspace(0, 1, 300)))
    assert BRAILLE.clipped not in "".join(rows)


def test_marks_stand_under_their_step_and_spare_the_labels() -> None:
    rows = drawn(view_of([1.0] * 100), marks=(Mark(50, "◆", "critical"), Mark(100, "▲", "warning")))
    assert abs(rows[-1].index("◆") - (GUTTER + 26)) <= 1
    assert rows[-1].endswith("▲ 100")


def test_the_cursor_shows_its_step() -> None:
    rows = drawn(view_of([1.0] * 100), cursor=40)
    assert " 40" in rows[-1].replace("─", " ")
    assert sum(BRAILLE.cursor in row[GUTTER:] for row in rows) >= 6


def test_a_log_scale_shows_decades_evenly() -> None:
    rows = drawn(view_of(10.0 ** np.linspace(-4, 0, 200)), log=True, averaged=False)
    middle = rows[4]
    assert 1e-3 < float(middle[: GUTTER - 1]) < 1e-1


@pytest.mark.parametrize("symbols", LADDER.values(), ids=LADDER)
def test_each_step_of_the_ladder_uses_only_its_own_characters(symbols: Symbols) -> None:
    values = np.sin(np.arange(300) / 20)
    values[100] = math.nan
    text = "".join(drawn(view_of(values), symbols, healthy=Band(-0.5, 0.5), cursor=250))
    allowed = {
        "braille": lambda c: True,
        "block": lambda c: not 0x2800 <= ord(c) < 0x2900,
        "ascii": lambda c: ord(c) < 128,
    }[symbols.name]
    assert all(allowed(c) for c in text)
    assert any(c not in " -|#0123456789." for c in text) or symbols is ASCII


def test_curve_and_band_differ_in_shape_so_that_colour_is_not_needed() -> None:
    for symbols in (ASCII, BLOCK):
        assert not set(symbols.line[1:]) & set(symbols.band[1:])


def test_drawing_a_long_curve_looks_at_no_more_columns_than_a_short_one() -> None:
    short, long = (
        resample(view_of(np.random.default_rng(0).normal(size=n)), 1, n, 100) for n in (200, 300_000)
    )
    assert len(long.at) <= 100
    assert len(short.at) <= 100


def test_symbols_follow_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert choose_symbols() is ASCII
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert choose_symbols() is BRAILLE
    monkeypatch.setenv("TERM", "linux")
    assert choose_symbols() is BLOCK
    assert choose_symbols("ascii") is ASCII


def test_few_points_are_shown_as_they_are() -> None:
    rows = drawn(view_of([0.2, 0.9]))
    assert "\u2800" < rows[0][-1] < "\u2900"


def test_a_flat_zero_is_shown_inside_its_healthy_range() -> None:
    assert choose_scale(np.zeros(5), np.zeros(5), Band(0, 0.1), log=False).high == pytest.approx(0.104)
