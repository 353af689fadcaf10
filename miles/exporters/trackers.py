"""Weights & Biases and MLflow, where their packages are installed.

Both are other people's programs with their own idea of a run: metrics go in under their own names and steps,
W&B offline unless the run file says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miles.errors import Unavailable

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
"""Module -> what to install for it."""
STEP = "step"
MLFLOW_PARAMS_PER_CALL = 100
"""What its server accepts in one call; of metrics it accepts 1,000."""


def require(module: str) -> None:
    """Raise Unavailable, with the line that installs it, when the package of a tracker is missing."""
    if find_spec(module) is None:
        raise Unavailable(
            f"the package {module} is not installed",
            why="it is not part of miles",
            fix=f"pip install {PACKAGES[module]}",
        )


@dataclass(frozen=True)
class WandbSettings:
    """The `wandb_*` settings of a run; None leaves the choice to W&B, but for `mode`."""

    mode: str = "offline"
    project: str | None = None
    group: str | None = None
    team: str | None = None
    host: str | None = None


class WandbSink:
    """Logs into one W&B run with the id of the miles run; files go under `<directory>/wandb`."""

    def __init__(self, directory: Path, run: str, config: dict[str, Any], settings: WandbSettings) -> None:
        require("wandb")
        wandb = import_module("wandb")
        directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            id=run,
            name=run,
            dir=str(directory),
            config=config,
            mode=settings.mode,
            project=settings.project or "miles",
            group=settings.group,
            entity=settings.team,
            resume="allow",
            settings=wandb.Settings(silent=True, **({"base_url": settings.host} if settings.host else {})),
        )
        # Its own step counter never goes back; a resumed run does.
        self._run.define_metric("*", step_metric=STEP)

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, STEP: step})

    def rewind(self, step: int) -> None:
        """W&B keeps every point it was given."""

    def flush(self) -> None:
        """W&B writes by itself."""

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """Logs into one MLflow run of `experiment`; without an address its store is `<directory>/mlflow.db`."""

    def __init__(
        self, directory: Path, run: str, config: dict[str, Any], experiment: str, uri: str | None
    ) -> None:
        require("mlflow")
        mlflow = import_module("mlflow")
        directory.mkdir(parents=True, exist_ok=True)
        self._client = mlflow.MlflowClient(uri or f"sqlite:///{(directory / 'mlflow.db').resolve()}")
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        self._id = self._client.create_run(number, run_name=run).info.run_id
        self._metric, param = mlflow.entities.Metric, mlflow.entities.Param
        params = [param(key, str(value)) for key, value in config.items()]
        for start in range(0, len(params), MLFLOW_PARAMS_PER_CALL):
            self._client.log_batch(self._id, params=params[start : start + MLFLOW_PARAMS_PER_CALL])

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        said_ms = int(time * 1000)
        points = [self._metric(name, value, said_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=points)

    def rewind(self, step: int) -> None:
        """MLflow keeps every point it was given."""

    def flush(self) -> None:
        """Points are stored as they come."""

    def close(self) -> None:
        self._client.set_terminated(self._id)
