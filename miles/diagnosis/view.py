"""What a rule sees: the history of a run, its config, and whether it lives, with a few ways to ask."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from miles.diagnosis.finding import Evidence
from miles.diagnosis.logs import LogScan, find_logs
from miles.diagnosis.root import Root, find_root, scan
from miles.diagnosis.thresholds import DEFAULT, Thresholds
from miles.diagnosis.trend import RewardTrend
from miles.record import History, RunReader, RunStatus, Series
from miles.record.heartbeat import Heartbeat

_EMPTY = Series()
QUANTISED = (
    "precision.fp8_format",
    "precision.fp8_recipe",
    "precision.fp4_format",
    "precision.fp4_recipe",
    "precision.int4_qat",
)
PLAIN_FORMATS = (None, "fp32", "bf16", "fp16")


@dataclass
class RecordView:
    """One look at a run. Cheap to make: a running trainer makes one per step.

    `whole` says that single events count however long ago they were (a post-mortem); otherwise they count for
    `thresholds.recent_steps`.
    """

    history: History
    config: Mapping[str, Any] = field(default_factory=dict)
    status: RunStatus | None = RunStatus.RUNNING
    """None: nobody can tell (files of another system)."""
    thresholds: Thresholds = DEFAULT
    whole: bool = False
    heartbeats: Mapping[str, Heartbeat] = field(default_factory=dict)
    foreign: bool = False
    """The metrics come from another system, whose config is not known."""
    log_files: tuple[Path, ...] = ()
    now: float = field(default_factory=time.time)
    asked: set[str] = field(default_factory=set)
    """Metrics that rules have looked at."""

    @classmethod
    def of_run(cls, reader: RunReader, thresholds: Thresholds = DEFAULT) -> RecordView:
        """The view that `miles diagnose` takes of a run directory."""
        return cls(
            history=reader.history,
            config=reader.config,
            status=reader.status(),
            thresholds=thresholds,
            whole=True,
            heartbeats=reader.heartbeats(),
            log_files=tuple(find_logs(reader.layout.logs_dir)),
        )

    @property
    def is_live(self) -> bool:
        """Whether the run goes on, so that a live setting can still be changed."""
        return self.status is RunStatus.RUNNING

    @cached_property
    def logs(self) -> LogScan:
        """What the log files tell; they are read when the first rule asks."""
        return scan(self)

    @cached_property
    def root(self) -> Root | None:
        """The first real exception or telling line, None when nothing failed."""
        return find_root(self)

    @cached_property
    def step(self) -> int:
        """The latest step with metrics, 0 before the first."""
        return self.history.last_step or 0

    def setting(self, dotted: str) -> Any:
        """A value of the run's config, None when it is not known."""
        section, _, name = dotted.partition(".")
        return self.config.get(section, {}).get(name)

    def series(self, metric: str) -> Series:
        """One metric; empty when it was never reported."""
        self.asked.add(metric)
        return self.history.series.get(metric, _EMPTY)

    def tail(self, metric: str, count: int) -> list[float]:
        """The last `count` finite values."""
        return [v for v in self.series(metric).values[-count:] if math.isfinite(v)]

    def head(self, metric: str, count: int) -> list[float]:
        """The first `count` finite values."""
        return [v for v in self.series(metric).values[:count] if math.isfinite(v)]

    def recent_mean(self, metric: str) -> float | None:
        """Mean over the last few steps; None until there are enough of them."""
        values = self.tail(metric, self.thresholds.mean_steps)
        return statistics.fmean(values) if len(values) == self.thresholds.mean_steps else None

    def first_mean(self, metric: str) -> float | None:
        """Mean over the first few steps; None until there are enough of them."""
        values = self.head(metric, self.thresholds.mean_steps)
        return statistics.fmean(values) if len(values) == self.thresholds.mean_steps else None

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind that still count: all of them in a post-mortem, else the recent ones."""
        found = self.history.of_kind(kind)
        return found if self.whole else [e for e in found if self.is_recent(e.get("step"))]

    def is_recent(self, step: int | None) -> bool:
        return self.whole or step is None or step > self.step - self.thresholds.recent_steps

    def flagged_steps(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of the non-zero or non-finite values that still count, oldest first."""
        series = self.series(metric)
        count = len(series) if self.whole else self.thresholds.recent_steps
        points = zip(series.steps[-count:], series.values[-count:], strict=True)
        return [(step, value) for step, value in points if value != 0 and self.is_recent(step)]

    def evidence(self, text: str, metric: str, count: int = 5) -> Evidence:
        """Evidence with the last `count` points of `metric`."""
        series = self.series(metric)
        return Evidence(text, metric, tuple(zip(series.steps[-count:], series.values[-count:], strict=True)))

    @cached_property
    def reward(self) -> RewardTrend | None:
        """How the raw reward moved, None before there are enough steps to tell."""
        return RewardTrend.of(self.series("rollout/raw_reward"), self.thresholds)

    @cached_property
    def is_moe(self) -> bool:
        return any(name.startswith("route/") for name in self.history.series)

    @property
    def replays_routes(self) -> bool:
        """Whether the trainer replays the engine's routes (R3); on by default for MoE models."""
        setting = self.setting("alignment.use_rollout_routing_replay")
        return self.is_moe if setting is None else bool(setting)

    @property
    def runs_ahead(self) -> bool:
        """Whether samples are older than the weights that learn from them: the log-prob gap then holds what
        was learnt in between."""
        ahead = self.setting("rollout.one_step_ahead") or self.setting("rollout.fully_async")
        return bool(ahead) or self.update_interval > 1

    @property
    def allowed_staleness(self) -> int:
        """Versions by which finished samples may lag in an asynchronous run; without a bound the buffer's."""
        if not self.setting("rollout.fully_async"):
            return 0
        bound = self.setting("rollout.max_weight_staleness")
        if bound is None:
            bound = 1 + (self.setting("rollout.async_data_buffer_capacity_factor") or 2.0)
        return int(bound)

    @property
    def update_interval(self) -> int:
        """Steps between two weight updates."""
        return int(self.setting("weight_sync.update_weights_interval") or 1)

    @property
    def is_quantised(self) -> bool:
        """Whether trainer or engine computes in FP8 or FP4, where a wider log-prob gap is normal."""
        quantised = self.setting("precision.rollout_format") not in PLAIN_FORMATS
        return quantised or any(self.setting(name) for name in QUANTISED)

    def checkpoint_before(self, step: int) -> int | None:
        """Step of the latest checkpoint written at or before `step`."""
        steps = [e["step"] for e in self.history.of_kind("checkpoint") if e["step"] <= step]
        return max(steps, default=None)
