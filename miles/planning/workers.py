"""Which processes a run consists of where workers have processes of their own, and what they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miles.config import RunConfig


@dataclass(frozen=True)
class WorkersPlan:
    """Processes beside the driver. Trainers and engines take `threads` CPUs each, reward workers one."""

    trainers: int
    engines: int
    reward_workers: int
    threads: int
    strategy: Literal["PACK", "SPREAD"] = "PACK"
    """On as few nodes as hold them, or on as many as there are."""
    gpus_per_engine: int = 0
    """0: the run asks for no GPUs, else every trainer has one."""
    shares_gpus: bool = False
    """Engines lie on the trainers' GPUs, and have no room of their own."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What to reserve: for trainers first, then for engines, then for reward workers."""
        beside = self.threads if self.shares_gpus else 0
        trainer = {"CPU": float(self.threads + beside)} | ({"GPU": 1.0} if self.gpus_per_engine else {})
        engine = {"CPU": float(self.threads)}
        if self.gpus_per_engine:
            engine["GPU"] = float(self.gpus_per_engine)
        engines = [] if self.shares_gpus else [engine] * self.engines
        return [trainer] * self.trainers + engines + [{"CPU": 1.0}] * self.reward_workers

    @property
    def first_judge(self) -> int:
        """The bundle of the first reward worker."""
        return self.trainers + (0 if self.shares_gpus else self.engines)

    @property
    def cpus(self) -> int:
        """CPUs of all processes, the driver's included."""
        return 1 + (self.trainers + self.engines) * self.threads + self.reward_workers

    @property
    def arithmetic(self) -> str:
        """How the CPUs add up, for people."""
        parts = ["driver 1"]
        for name, count, each in (
            ("trainers", self.trainers, self.threads),
            ("engines", self.engines, self.threads),
            ("reward workers", self.reward_workers, 1),
        ):
            if count:
                parts.append(f"{name} {count} × {each}")
        return f"{' + '.join(parts)} = {self.cpus} CPU"


def trainer_ranks(config: RunConfig) -> int:
    """Trainer processes: one for each GPU; without GPUs data-parallel copies, each cut over some with
    Megatron.
    """
    cluster = config.cluster
    if config.training.backend == "megatron" and cluster.actor_num_gpus_per_node:
        return cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
    copies, parallel = config.training.data_parallel_size, config.parallel
    if config.training.backend != "megatron":
        return copies
    cut = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return copies * cut * parallel.context_parallel_size


def plan_workers(config: RunConfig, threads: int) -> WorkersPlan:
    """Trainer ranks, engines and reward workers as set; only the first where nothing is sampled."""
    ranks, strategy = trainer_ranks(config), config.cluster.placement_strategy
    if config.algorithm.loss_type == "sft_loss":
        return WorkersPlan(ranks, 0, 0, threads, strategy)
    engines = len(config.rollout.rollout_external_engine_addrs) or config.engine.num_engines
    cluster, on_gpus = config.cluster, asks_for_gpus(config)
    each = cluster.rollout_num_gpus_per_engine
    if on_gpus and cluster.rollout_num_gpus:
        engines = cluster.rollout_num_gpus // each
    return WorkersPlan(
        ranks,
        engines,
        config.reward.num_reward_workers,
        threads,
        strategy,
        gpus_per_engine=each if on_gpus else 0,
        shares_gpus=on_gpus and cluster.colocate,
    )


def asks_for_gpus(config: RunConfig) -> bool:
    """Whether the run is placed on GPUs: miles' own trainer and engine are placed on none."""
    scaled = config.training.backend == "megatron" or config.rollout.backend == "sglang"
    return scaled and config.cluster.actor_num_gpus_per_node > 0
