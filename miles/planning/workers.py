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
    """Trainer processes of a run without GPUs: data-parallel copies, each cut over some with Megatron."""
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
    return WorkersPlan(ranks, engines, config.reward.num_reward_workers, threads, strategy)
