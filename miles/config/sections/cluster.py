"""`[cluster]`: how many accelerators train, how many sample, and whether they are the same ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from miles.config.sections.base import Port, Section, Table


class ClusterSection(Section):
    """Placement of trainer, critic and engines on the nodes of a cluster."""

    address: str | None = None
    """Address of a running Ray cluster; the run is submitted to it as a job and its log is streamed."""

    ray_dashboard_port: Port = 8265
    """Port of the cluster's job server."""

    placement_strategy: Literal["PACK", "SPREAD"] = "PACK"
    """How Ray lays trainers, engines and reward workers on nodes: on as few as hold them, or on as many as
    there are."""

    actor_num_nodes: PositiveInt = 1
    """Nodes that train the policy."""

    actor_num_gpus_per_node: NonNegativeInt = 8
    """GPUs per node that train the policy (0: train on CPU)."""

    critic_num_nodes: PositiveInt | None = None
    """Nodes that train the critic; default: as many as the policy's."""

    critic_num_gpus_per_node: PositiveInt | None = None
    """GPUs per node that train the critic; default: as many as the policy's."""

    rollout_num_gpus: NonNegativeInt | None = None
    """GPUs of all engines together; default under `colocate`: the trainer's."""

    rollout_num_gpus_per_engine: PositiveInt = 1
    """GPUs of one engine: its tensor-parallel size."""

    num_gpus_per_node: PositiveInt = 8
    """GPUs of one node."""

    colocate: bool = False
    """Trainer and engines take turns on the same GPUs."""

    offload: bool = False
    """Under `colocate`, give GPU memory back between turns, on both sides."""

    offload_train: bool | None = None
    """Give the trainer's GPU memory back during rollout; default: as `offload`, on under `colocate`."""

    offload_rollout: bool | None = None
    """Give the engines' GPU memory back during training; default: as `offload`, on under `colocate`."""

    offload_train_target: Literal["cpu", "disk"] = "cpu"
    """Where the trainer's state goes while the engines have the GPU."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Collective library; default: NCCL on GPU, gloo on CPU."""

    distributed_timeout_minutes: PositiveInt = 10
    """Minutes until a collective that does not finish is an error."""

    train_env_vars: Table = Field(default_factory=dict)
    """Environment variables for trainer processes only, as a table."""
