"""The learning rate over updates."""

from __future__ import annotations

import math

import pytest

from miles.training.native.schedule import learning_rate
from miles.training.settings import ScheduleSettings


def rates(updates: int, **settings) -> list[float]:
    return [learning_rate(u, 1.0, ScheduleSettings(**settings)) for u in range(updates)]


def test_constant_after_a_linear_warmup_that_wastes_no_update() -> None:
    assert rates(6, lr_warmup_iters=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_reaches_the_floor_and_stays() -> None:
    expected = [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert rates(6, lr_decay_style="linear", lr_decay_iters=4, min_lr=0.2) == pytest.approx(expected)


def test_cosine_decay_counts_the_warmup_in() -> None:
    got = rates(7, lr_decay_style="cosine", lr_warmup_iters=2, lr_decay_iters=6, min_lr=0.1)
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert got == pytest.approx([0.5, 1.0, *cosine, 0.1])


def test_a_live_change_of_the_peak_keeps_the_shape() -> None:
    settings = ScheduleSettings(lr_decay_style="linear", lr_decay_iters=10)
    assert learning_rate(5, 4.0, settings) == pytest.approx(4 * learning_rate(5, 1.0, settings))
