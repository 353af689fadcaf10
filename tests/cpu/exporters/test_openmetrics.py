"""The OpenMetrics text: grammar, values, and the page that serves it."""

from __future__ import annotations

import math
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from miles.errors import Unavailable
from miles.exporters import export_run
from miles.exporters.openmetrics import CONTENT_TYPE, Latest
from miles.exporters.prometheus_page import PrometheusPage

LINE = re.compile(
    r"# (TYPE [a-zA-Z_][a-zA-Z0-9_]* gauge|HELP [a-zA-Z_][a-zA-Z0-9_]* .*|EOF)"
    r'|[a-zA-Z_][a-zA-Z0-9_]*\{([a-z]+="([^"\\\n]|\\["\\n])*",?)+\} (NaN|[+-]Inf|-?[0-9.e+-]+)'
)


def test_the_textfile_holds_the_last_values_of_the_live_run(run: Path, tmp_path: Path) -> None:
    (path,) = export_run(run, "openmetrics", tmp_path)
    lines = path.read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert lines[-1] == "# EOF"
    assert 'miles_step{run="sort-1"} 6' in lines
    assert 'miles_rollout_raw_reward{run="sort-1",metric="rollout/raw_reward"} 0.6' in lines
    assert [p.name for p in tmp_path.glob("*.prom*")] == ["sort-1.prom"]


def test_names_that_fall_together_stay_apart_under_one_family() -> None:
    latest = Latest("r")
    latest.log(1, 0.0, {"eval/a-b": 1.0, "eval/a_b": 2.0})
    text = latest.text()
    assert text.count("# TYPE miles_eval_a_b gauge") == 1
    assert 'metric="eval/a-b"} 1.0' in text and 'metric="eval/a_b"} 2.0' in text


def test_non_finite_values_and_odd_run_names_keep_to_the_grammar() -> None:
    latest = Latest('a "b"\\\n')
    latest.log(1, 0.0, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/ppo_kl": -math.inf})
    lines = latest.text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert sorted(line.rsplit(" ", 1)[1] for line in lines if line.startswith("miles_train")) == [
        "+Inf",
        "-Inf",
        "NaN",
    ]


def test_the_page_serves_what_was_flushed_on_loopback_only() -> None:
    page = PrometheusPage("r", port=0)
    try:
        page.log(3, 0.0, {"train/loss": 0.5})
        page.flush()
        with urllib.request.urlopen(f"http://127.0.0.1:{page.port}/metrics", timeout=300) as answer:
            assert answer.headers["Content-Type"] == CONTENT_TYPE
            assert 'miles_train_loss{run="r",metric="train/loss"} 0.5' in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{page.port}/etc", timeout=300)
        with pytest.raises(Unavailable, match="--prometheus-port"):
            PrometheusPage("s", port=page.port)
    finally:
        page.close()
