"""Live export: a process of its own reads the run's record and copies it, so it can never break the run.

`follow(run_dir)` starts it and comes back at once; which exporters it feeds stands in the run's own
config.json, section `record`. It ends by itself when the run has ended, whatever the end was.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from miles.exporters.export import default_directory, settings_of
from miles.exporters.sink import Sink, pass_on
from miles.exporters.tensorboard import TensorBoardSink
from miles.exporters.trackers import MlflowSink, WandbSettings, WandbSink, require
from miles.record import RunLayout, RunReader

POLL_SECONDS = 1.0
LOG_FILE = "exporters.log"


def follow(run_dir: str | Path, attempt: int = 1) -> subprocess.Popen[bytes] | None:
    """Start copying an attempt's record to the exporters that the run's settings ask for; None for none.

    To be called once the attempt's writer is open: from then on the run counts as running. Nobody has to wait
    for the process; what it has to say goes to `logs/exporters.log`.

    Raises:
        Unavailable: the package of a tracker is not installed.
    """
    layout = RunLayout(run_dir)
    record = RunReader(run_dir, read=False).config.get("record", {})
    wanted = [name for name in LIVE if record.get(f"use_{name}")]
    if not wanted:
        return None
    for tracker in ("wandb", "mlflow"):
        if tracker in wanted:
            require(tracker)
    layout.logs_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "miles.exporters", str(layout.root.resolve()), str(attempt)]
    with (layout.logs_dir / LOG_FILE).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def copy_until_end(
    reader: RunReader, sinks: Sequence[Sink], attempt: int = 1, poll_seconds: float = POLL_SECONDS
) -> None:
    """Copy what `attempt` has written and goes on writing, until it or the run has ended.

    Earlier attempts were copied by followers of their own.
    """
    ended = False
    while not ended:
        # Asked before reading: what a run wrote before its end is then read after it.
        ended = reader.status().ended
        records = reader.poll()
        ended = ended or reader.attempt > attempt
        own = [record for record in records if record["attempt"] == attempt]
        if own:
            pass_on(own, sinks)
            for sink in sinks:
                sink.flush()
        reader.history.forget_before(reader.history.last_step or 0)
        if not ended:
            time.sleep(poll_seconds)
    for sink in sinks:
        sink.close()


def live_sinks(reader: RunReader) -> list[Sink]:
    """The sinks that the run's settings ask for."""
    record = reader.config["record"]
    return [make(reader, record) for name, make in LIVE.items() if record.get(f"use_{name}")]


def _tensorboard(reader: RunReader, record: dict[str, Any]) -> Sink:
    root = record.get("tb_project_name") or default_directory(reader, "tensorboard")
    return TensorBoardSink(Path(root) / (record.get("tb_experiment_name") or reader.run_id))


def _wandb(reader: RunReader, record: dict[str, Any]) -> Sink:
    settings = WandbSettings(
        mode=record.get("wandb_mode") or "offline",
        project=record.get("wandb_project"),
        group=record.get("wandb_group"),
        team=record.get("wandb_team"),
        host=record.get("wandb_host"),
    )
    directory = Path(record.get("wandb_dir") or default_directory(reader, "wandb"))
    return WandbSink(directory, reader.run_id, settings_of(reader), settings)


def _mlflow(reader: RunReader, record: dict[str, Any]) -> Sink:
    directory = default_directory(reader, "mlflow")
    name, uri = record["mlflow_experiment_name"], record.get("mlflow_tracking_uri")
    return MlflowSink(directory, reader.run_id, settings_of(reader), name, uri)


def _prometheus(reader: RunReader, record: dict[str, Any]) -> Sink:
    from miles.exporters.prometheus_page import PrometheusPage

    return PrometheusPage(reader.run_id, record["prometheus_port"])


LIVE: dict[str, Callable[[RunReader, dict[str, Any]], Sink]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "prometheus": _prometheus,
}
"""By the name in `record.use_<name>`."""
