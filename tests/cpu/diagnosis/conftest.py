"""Runs made up step by step, written through the real writer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from miles.record import History, RecordWriter, RunReader

Metrics = dict[str, float]
CONFIG = {
    "optimizer": {"lr": 4e-4, "clip_grad": 1.0},
    "rollout": {"rollout_max_response_len": 12, "num_rollout": 80},
    "training": {"num_steps_per_rollout": 1, "non_finite_policy": "skip"},
    "alignment": {"use_rollout_routing_replay": True},
}


def healthy_step(step: int, rng: random.Random, steps: int = 80) -> Metrics:
    """A step of the quickstart as five seeds of it went: reward rises, entropy falls, groups get solved."""
    solved = 1 - math.exp(-step / 15)
    zero_std = min(0.75, max(0.0, 0.1 + 0.58 * solved + rng.gauss(0, 0.06)))
    one = zero_std * (0.4 + 0.55 * solved)
    return {
        "rollout/raw_reward": min(1.0, 0.45 + 0.47 * solved + rng.gauss(0, 0.04)),
        "rollout/response_len/mean": 7.0 + rng.gauss(0, 0.1),
        "rollout/truncated_ratio": max(0.0, rng.gauss(0.02, 0.01)),
        "rollout/repetition_frac": 0.0,
        "rollout/none_reward_ratio": 0.0,
        "rollout/zero_std/fraction": zero_std,
        "rollout/zero_std/all_one_percentage": one,
        "rollout/zero_std/all_zero_percentage": zero_std - one,
        "rollout/log_probs": -0.3,
        "rollout/rollout_log_probs": -0.3,
        "train/active_group_fraction": 1 - zero_std,
        "train/entropy": 0.5 - 0.41 * solved + rng.gauss(0, 0.01),
        "train/grad_norm": rng.uniform(1.0, 3.2),
        "train/loss": rng.gauss(0, 0.02),
        "train/ppo_kl": rng.gauss(0, 1e-8),
        "train/pg_clipfrac": 0.0,
        "train/train_rollout_logprob_abs_diff": abs(rng.gauss(2e-7, 1e-7)),
        "train/kl_loss": 0.08 * solved,
        "train/ess_ratio": 1.0,
        "train/log_ratio_bounded": 0.0,
        "rollout/ref_log_probs": -0.3,
        "rollout/weight_version/min": step - 1.0,
        "rollout/weight_version/max": step - 1.0,
        "rollout/weight_version/mixed_version_ratio": 0.0,
        "rollout/prefix_cache_hit_rate": 0.875,
        "eval/sort": 0.36 + 0.5 * solved,
        "train/non_finite_elements": 0.0,
        "train/step_skipped": 0.0,
        "route/flip_frac": abs(rng.gauss(0, 1e-4)),
        "route/zero_overlap_frac": 0.0,
        "route/replayed_rows_frac": 1.0,
        "route/expert_load_max_over_mean": rng.uniform(1.2, 1.9),
        "perf/step_time": 0.12,
    }


@pytest.fixture
def healthy() -> Callable[[int], list[Metrics]]:
    """80 healthy steps of one seed."""

    def make(seed: int) -> list[Metrics]:
        rng = random.Random(seed)
        return [healthy_step(step, rng) for step in range(1, 81)]

    return make


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., RunReader]:
    """Write steps (numbered from 1) as a run and read it back; `events` are (kind, fields) pairs."""

    def write(
        steps: Iterable[Metrics],
        config: dict[str, dict[str, object]] | None = None,
        events: Iterable[tuple[str, dict[str, object]]] = (),
        name: str = "run",
    ) -> RunReader:
        run = tmp_path / name
        with RecordWriter(run, history=History()) as writer:
            for step, metrics in enumerate(steps, start=1):
                # As an event: the writer refuses metrics of other systems, which some rules read.
                writer.event("metrics", step=step, metrics=metrics)
            for kind, fields in events:
                writer.event(kind, **fields)  # type: ignore[arg-type]
        merged = {section: {**values} for section, values in CONFIG.items()}
        for section, values in (config or {}).items():
            merged.setdefault(section, {}).update(values)
        (run / "config.json").write_text(json.dumps({"values": merged, "origins": {}}))
        return RunReader(run)

    return write


def _between(points: dict[int, float], step: int) -> float:
    """Linear interpolation through (step, value) points, flat outside them."""
    known = sorted(points)
    if step <= known[0]:
        return points[known[0]]
    for left, right in pairwise(known):
        if step <= right:
            share = (step - left) / (right - left)
            return points[left] * (1 - share) + points[right] * share
    return points[known[-1]]


def collapsing_step(step: int, rng: random.Random, curves: dict[str, dict[int, float]]) -> Metrics:
    """A healthy step with the given metrics replaced by the curves of a collapsing recipe."""
    metrics = healthy_step(1, rng)
    metrics |= {"rollout/weight_version/min": step - 1.0, "rollout/weight_version/max": step - 1.0}
    for name, points in curves.items():
        metrics[name] = max(0.0, _between(points, step) * (1 + rng.gauss(0, 0.05)))
    return metrics


SUDDEN_DEATH = {  # sorting task, learning rate 1e-2
    "rollout/raw_reward": {1: 0.34, 2: 0.31, 3: 0.14, 4: 0.04, 5: 0.0},
    "train/active_group_fraction": {1: 0.88, 3: 0.6, 5: 0.0},
    "train/grad_norm": {1: 2.9, 3: 5.0, 4: 1.0, 5: 0.0},
    "rollout/response_len/mean": {1: 6.6, 5: 10.8},
    "rollout/truncated_ratio": {1: 0.02, 5: 0.85},
    "rollout/zero_std/fraction": {1: 0.12, 5: 1.0},
    "rollout/zero_std/all_zero_percentage": {1: 0.08, 5: 1.0},
    "rollout/zero_std/all_one_percentage": {1: 0.04, 5: 0.0},
}
SLOW_DEATH = {  # sorting task, learning rate 3e-3
    "rollout/raw_reward": {1: 0.34, 6: 0.30, 11: 0.21, 16: 0.13, 21: 0.06, 25: 0.05, 60: 0.002},
    "train/active_group_fraction": {1: 0.88, 25: 0.12, 60: 0.05},
    "train/grad_norm": {1: 2.9, 15: 7.0, 25: 9.6},
    "rollout/response_len/mean": {1: 6.6, 25: 8.5},
    "rollout/zero_std/fraction": {1: 0.12, 25: 0.88},
    "rollout/zero_std/all_zero_percentage": {1: 0.08, 25: 0.87},
    "rollout/zero_std/all_one_percentage": {1: 0.04, 25: 0.01},
}


@pytest.fixture
def sudden_death() -> Callable[..., list[Metrics]]:
    return lambda seed=0, steps=80: _run(SUDDEN_DEATH, seed, steps)


@pytest.fixture
def slow_death() -> Callable[..., list[Metrics]]:
    return lambda seed=0, steps=80: _run(SLOW_DEATH, seed, steps)


def _run(curves: dict[str, dict[int, float]], seed: int, steps: int) -> list[Metrics]:
    rng = random.Random(seed)
    return [collapsing_step(step, rng, curves) for step in range(1, steps + 1)]
