"""The latest value of every metric in OpenMetrics text, for Prometheus.

A metric `train/loss` is the gauge `miles_train_loss`; the label `metric` keeps its own name, `run` names the
run. The format is https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md, in the
part that the textfile collector of node_exporter reads as well.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from miles.record.metrics import find_metric

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"
STEP_GAUGE = "miles_step"


class Latest:
    """The last value of each metric and the step it belongs to."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.step: int | None = None
        self.values: dict[str, float] = {}

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self.step = step
        self.values |= metrics

    def rewind(self, step: int) -> None:
        """Values stay until the run says new ones; they are of the last step that was measured."""
        self.step = step

    def text(self) -> str:
        """Everything known now as one exposition."""
        families: dict[str, list[str]] = {}
        for name in sorted(self.values):
            families.setdefault(gauge_name(name), []).append(name)
        lines: list[str] = []
        if self.step is not None:
            lines += [
                *_declare(STEP_GAUGE, "optimizer steps finished"),
                f"{self._sample(STEP_GAUGE)} {self.step}",
            ]
        for gauge, names in families.items():
            metric = find_metric(names[0])
            lines += _declare(gauge, metric.meaning if metric else names[0])
            lines += [f"{self._sample(gauge, name)} {_number(self.values[name])}" for name in names]
        return "\n".join([*lines, "# EOF", ""])

    def _sample(self, gauge: str, metric: str | None = None) -> str:
        labels = {"run": self.run} | ({"metric": metric} if metric else {})
        pairs = (f'{key}="{_escape(value)}"' for key, value in labels.items())
        return f"{gauge}{{{','.join(pairs)}}}"


class TextfileSink(Latest):
    """Keeps `<directory>/<run>.prom` up to date; a reader never sees half of it."""

    def __init__(self, directory: Path, run: str) -> None:
        super().__init__(run)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"{run}.prom"

    def flush(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.text())
        os.replace(temporary, self.path)

    def close(self) -> None:
        self.flush()


def gauge_name(metric: str) -> str:
    """`train/grad_norm` -> `miles_train_grad_norm`: only letters, digits and underscores."""
    return "miles_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


def _declare(gauge: str, meaning: str) -> list[str]:
    return [f"# TYPE {gauge} gauge", f"# HELP {gauge} {_escape(meaning)}"]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
