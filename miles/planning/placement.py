"""How many GPUs train and how many sample, and how engines lie on nodes."""

from __future__ import annotations

from dataclasses import dataclass

from miles.config import RunConfig


@dataclass(frozen=True)
class Placement:
    """GPUs of the trainer and of the engines; under `colocate` engines share the trainer's."""

    trainer_nodes: int
    trainer_gpus_per_node: int
    rollout_gpus: int
    gpus_per_engine: int
    colocate: bool

    @property
    def trainer_gpus(self) -> int:
        return self.trainer_nodes * self.trainer_gpus_per_node

    @property
    def engines(self) -> int:
        return self.rollout_gpus // self.gpus_per_engine

    @property
    def total_gpus(self) -> int:
        """GPUs that the run occupies."""
        training = self.trainer_gpus
        return max(training, self.rollout_gpus) if self.colocate else training + self.rollout_gpus

    @property
    def arithmetic(self) -> str:
        """`total_gpus` as a sum that a reader can check."""
        trainer = f"{self.trainer_nodes} x {self.trainer_gpus_per_node} for the trainer"
        if self.colocate:
            return f"{trainer}, shared with the engines = {self.total_gpus}"
        return f"{trainer} + {self.rollout_gpus} for engines = {self.total_gpus}"


def plan_placement(config: RunConfig) -> Placement:
    """The placement that a run file asks for; engines without a number of GPUs have none."""
    cluster = config.cluster
    return Placement(
        trainer_nodes=cluster.actor_num_nodes,
        trainer_gpus_per_node=cluster.actor_num_gpus_per_node,
        rollout_gpus=cluster.rollout_num_gpus or 0,
        gpus_per_engine=cluster.rollout_num_gpus_per_engine,
        colocate=cluster.colocate,
    )
