"""Late export: a recorded run, finished or not, in another system's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miles.exporters import tensorboard
from miles.exporters.openmetrics import TextfileSink
from miles.exporters.sink import Sink, replay
from miles.exporters.tables import TABLE_FORMATS, write_tables
from miles.exporters.trackers import MlflowSink, WandbSettings, WandbSink
from miles.record import RunReader

SINK_FORMATS = ("tensorboard", "openmetrics", "wandb", "mlflow")
FORMATS = (*SINK_FORMATS, *TABLE_FORMATS)


def export_run(run_dir: str | Path, to: str, out: Path | None = None) -> list[Path]:
    """Write what the run has said so far into `out` (default: `<run_dir>/exports/<to>`).

    An earlier export of the same run to the same place is replaced; MLflow gets a run of its own each time.

    Args:
        to: one of `FORMATS`.

    Returns:
        The files written; for the trackers, the directory.

    Raises:
        RunError: `run_dir` is not a run. Unavailable: the tracker's package is not installed.
    """
    assert to in FORMATS, to
    reader = RunReader(run_dir)
    directory = out or default_directory(reader, to)
    if to in TABLE_FORMATS:
        return write_tables(reader, directory, to)
    if to == "tensorboard":
        tensorboard.clear(directory / reader.run_id)
    sink = open_sink(reader, to, directory)
    replay(reader, sink)
    sink.close()
    return _files(to, directory, reader.run_id)


def default_directory(reader: RunReader, to: str) -> Path:
    """Where an export goes unless somebody says otherwise."""
    return reader.layout.root / "exports" / to


def open_sink(reader: RunReader, to: str, directory: Path) -> Sink:
    """A sink of one of `SINK_FORMATS` for the run; trackers get its settings under dotted keys."""
    run = reader.run_id
    if to == "tensorboard":
        rows = reader.rows()
        return tensorboard.TensorBoardSink(directory / run, clock=rows[0].time if rows else None)
    if to == "openmetrics":
        return TextfileSink(directory, run)
    config = settings_of(reader)
    if to == "wandb":
        return WandbSink(directory, run, config, WandbSettings())
    return MlflowSink(directory, run, config, experiment="miles", uri=None)


def settings_of(reader: RunReader) -> dict[str, Any]:
    """The run's settings under dotted keys; those that are None are left out."""
    return {
        f"{section}.{name}": value
        for section, values in reader.config.items()
        for name, value in values.items()
        if value is not None
    }


def _files(to: str, directory: Path, run: str) -> list[Path]:
    if to == "tensorboard":
        return sorted((directory / run).glob(f"*{tensorboard.SUFFIX}"))
    return [directory / f"{run}.prom"] if to == "openmetrics" else [directory]
