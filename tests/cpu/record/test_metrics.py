"""The metric table: every name once, patterns found, ranges that mean something."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from miles.record.metrics import METRICS, Band, find_metric
from miles.record.reference import metrics_page


def test_every_metric_is_declared_once_with_a_meaning_and_what_moves_it() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(metric.meaning and metric.moved_by for metric in METRICS)
    assert {metric.group for metric in METRICS} == {"train", "route", "precision", "rollout", "perf", "eval"}


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("train/loss", "train/loss"),
        ("route/flip_frac/layer_11", "route/flip_frac/layer_<i>"),
        ("eval/gsm8k", "eval/<name>"),
        ("eval/gsm8k-greedy", "eval/<name>-greedy"),
        ("eval/gsm8k-truncated_ratio", "eval/<name>-truncated_ratio"),
        ("rollout/zero_std/count_0.5", "rollout/zero_std/count_<reward>"),
    ],
)
def test_a_name_finds_its_declaration(name: str, declared: str) -> None:
    metric = find_metric(name)
    assert metric is not None and metric.name == declared


@pytest.mark.parametrize("name", ["loss", "train/lossy", "route/flip_frac/layer_x", "eval/a/b", "train/"])
def test_other_names_are_unknown(name: str) -> None:
    assert find_metric(name) is None


def test_a_band_holds_its_bounds_and_never_nan() -> None:
    assert Band(0, 1).contains(0) and Band(0, 1).contains(1) and not Band(0, 1).contains(1.01)
    assert Band(low=3).contains(1e9) and not Band(low=3).contains(2)
    assert not any(band.contains(math.nan) for band in (Band(0, 1), Band(low=0), Band(high=0)))
    assert (str(Band(0, 0.03)), str(Band(low=0.8)), str(Band(high=2)), str(Band(0, 0))) == (
        "0 – 0.03",
        "≥ 0.8",
        "≤ 2",
        "0",
    )


def test_the_reference_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"
    assert page.read_text() == metrics_page(), "run: python -m miles.record.reference docs/reference"
