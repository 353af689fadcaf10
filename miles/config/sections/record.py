"""`[record]`: what a run writes down, and to which trackers it is copied."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from miles.config.sections.base import Port, Section


class RecordSection(Section):
    """The run record and its exporters."""

    sample_records_per_step: NonNegativeInt = 8
    """Samples of each rollout written to the record, text and tokens."""

    heartbeat_interval: PositiveFloat = 5.0
    """Seconds between heartbeats of a worker."""

    log_passrate: bool = False
    """Report pass@k of each rollout."""

    log_multi_turn: bool = False
    """Report turns per sample and tokens per turn."""

    log_reward_category: str | None = None
    """Report rewards by this entry of the reward table."""

    log_correct_samples: bool = False
    """Report lengths of the samples with full reward apart."""

    use_tensorboard: bool = False
    """Copy metrics to TensorBoard event files."""

    tb_project_name: str | None = None
    """Directory of TensorBoard files; default: `exports/tensorboard` in the run directory."""

    tb_experiment_name: str | None = None
    """Name of the TensorBoard run; default: the run's name."""

    use_wandb: bool = False
    """Copy metrics to Weights & Biases."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """How W&B works; default: offline."""

    wandb_project: str | None = None
    """W&B project."""

    wandb_group: str | None = None
    """W&B group."""

    wandb_team: str | None = None
    """W&B entity."""

    wandb_dir: str | None = None
    """Directory of W&B files; default: `exports/wandb` in the run directory."""

    wandb_host: str | None = None
    """Address of a self-hosted W&B server."""

    use_mlflow: bool = False
    """Copy metrics to MLflow."""

    mlflow_tracking_uri: str | None = None
    """Address of the MLflow server, or a directory."""

    mlflow_experiment_name: str = "miles"
    """MLflow experiment."""

    use_prometheus: bool = False
    """Serve the latest metrics to Prometheus on the loopback interface."""

    prometheus_port: Port = 9090
    """Port of the Prometheus page."""
