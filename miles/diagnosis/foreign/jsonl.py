"""Metrics that other systems keep as JSON: one object per line, or a trainer's `trainer_state.json`.

Read are flat objects with a step (`_step`, `step`, `global_step`, `train/step`, …), objects that nest their
metrics under `data` or `metrics` (verl's file logger), and the `log_history` of transformers' trainers, whose
names lack the `train/` that the same trainers write elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miles.diagnosis.foreign.tfevents import Scalar

STEPS = ("_step", "step", "global_step", "training/global_step", "train/global_step")
TIMES = ("_timestamp", "time", "timestamp")
NESTED = ("data", "metrics")
PROBE_LINES = 20
_NOT_METRICS = frozenset({*STEPS, *TIMES, "epoch", "_runtime"})


def is_metric_log(path: Path) -> bool:
    """Whether one of the first lines is an object with a step and a number beside it."""
    if path.name == "trainer_state.json":
        return True
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        head = [line for line, _ in zip(file, range(PROBE_LINES), strict=False)]
    return any(list(_row(value)) for line in head if (value := _object(line)) is not None)


def read_json_metrics(path: Path) -> Iterator[Scalar]:
    """Every metric of the file in the order written; lines that are no such objects are passed over."""
    if path.name == "trainer_state.json":
        state = _object(path.read_bytes()) or {}
        for row in state.get("log_history", ()):
            yield from (s._replace(tag=_with_group(s.tag)) for s in _row(row))
        return
    with path.open("rb") as file:
        for line in file:
            if (value := _object(line)) is not None:
                yield from _row(value)


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)  # unlike orjson it reads NaN, which trainers do write
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _row(value: dict[str, Any]) -> Iterator[Scalar]:
    time = next((float(value[name]) for name in TIMES if _is_number(value.get(name))), 0.0)
    metrics = next((value[name] for name in NESTED if isinstance(value.get(name), dict)), value)
    common = next((value[name] for name in STEPS if _is_number(value.get(name))), None)
    for name, number in metrics.items():
        own_step = f"{name.partition('/')[0]}/step"
        step = metrics.get(own_step, common)
        if step is None or not _is_number(number) or not _is_number(step):
            continue
        if name not in _NOT_METRICS and name != own_step:
            yield Scalar(time, int(float(step)), name, float(number))


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf", "NaN", "Infinity", "-Infinity")
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_group(name: str) -> str:
    """`eval_reward` -> `eval/reward`, `reward` -> `train/reward`: the names of its own callbacks."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
