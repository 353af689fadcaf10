"""A metric in bounded memory: what is old gets coarse, but no spike and no NaN is ever lost."""

from __future__ import annotations

import math

import numpy as np

from miles_cli.dashboard.track import NAN, PLUS_INF, Track


def filled(n: int, exact: int = 64, buckets: int = 256, **values: float) -> Track:
    track = Track(exact=exact, buckets=buckets)
    data = np.ones(n)
    for step, value in values.items():
        data[int(step[1:]) - 1] = value
    for start in range(0, n, 7):
        steps = np.arange(start + 1, min(n, start + 7) + 1)
        track.extend(steps, data[steps - 1])
    return track


def test_memory_does_not_grow_with_the_run() -> None:
    view = filled(20_000, buckets=512).view()
    assert len(view.steps) <= 2 * 64
    assert len(view.old_steps) <= 512
    assert (view.first_step, view.last_step) == (view.old_steps[0], 20_000)


def test_a_spike_survives_any_folding() -> None:
    view = filled(5_000, s77=9.0, s4000=-3.0).view()
    assert np.nanmax(view.old_high) == 9.0
    assert np.nanmin(view.old_low) == -3.0


def test_nan_and_infinity_survive_and_do_not_poison_the_mean() -> None:
    view = filled(5_000, s77=math.nan, s90=math.inf).view()
    assert np.bitwise_or.reduce(view.old_bad) == NAN | PLUS_INF
    assert np.allclose(view.old_mean[np.isfinite(view.old_mean)], 1.0)


def test_means_of_merged_buckets_are_means_of_their_points() -> None:
    track = Track(exact=64, buckets=4)
    values = np.arange(1.0, 513.0)
    track.extend(np.arange(1, 513), values)
    view = track.view()
    sizes = np.diff(np.concatenate([[0], view.old_steps]))
    assert np.isclose((view.old_mean * sizes).sum() + view.values.sum(), values.sum())


def test_a_view_never_changes_afterwards() -> None:
    track = filled(60)
    view = track.view()
    before = view.values.copy()
    track.truncate(10)
    track.extend(np.arange(11, 400), np.zeros(389))
    assert len(view.steps) == 60
    assert (view.values == before).all()


def test_resuming_cuts_what_came_after() -> None:
    track = filled(100)
    track.truncate(40)
    track.extend(np.array([41]), np.array([5.0]))
    assert track.view().last_step == 41
    assert track.view().at(41) == 5.0


def test_truncating_reaches_into_the_folded_part() -> None:
    track = filled(5_000)
    track.truncate(1_000)
    assert track.last_step is None
    assert track.view().old_steps[-1] <= 1_000


def test_value_at_a_step() -> None:
    view = filled(100, s50=2.0).view()
    assert view.at(50) == 2.0
    assert view.at(0) is None
    assert view.at(1_000_000) == 1.0
