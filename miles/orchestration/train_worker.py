"""The training side of the ring: finished samples in, one rollout's worth of optimizer steps out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from miles.data.batch import TrainBatch, pack
from miles.data.route_codec import compact
from miles.data.sample import Sample
from miles.errors import RunError
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.native.trainer import NativeTrainer
from miles.training.trainer import TrainResult

AnyTrainer = NativeTrainer | MegatronTrainer


class TrainWorker:
    """Owns a trainer. Lives in the driver's process or in a process of its own, so callers await it."""

    def __init__(self, trainer: AnyTrainer, reward_key: str | None) -> None:
        self.trainer = trainer
        self._reward_key = reward_key
        self.still, self.learnt = asyncio.Lock(), 0
        """See `broadcast_weights.BroadcastSource`."""

    async def train(self, samples: Sequence[Sample]) -> TrainResult:
        """Pack the samples and train on them; adds the time and speed of it to the metrics."""
        started = time.perf_counter()
        batch: TrainBatch = pack(samples, self._reward_key)
        async with self.still:
            self.learnt += 1
            result = self.trainer.train_step(batch)
        seconds = time.perf_counter() - started
        result.metrics["perf/train_time"] = seconds
        result.metrics["perf/train_tokens_per_sec"] = batch.num_tokens / seconds
        if batch.routes is not None:
            result.metrics["route/bytes_per_token"] = batch.routes.nbytes / batch.num_tokens
            result.metrics["route/wire_bytes_per_token"] = compact(batch.routes).nbytes / batch.num_tokens
        return result

    async def update_reference(self) -> None:
        """The policy of this moment becomes the reference."""
        self.trainer.update_reference()

    async def set_knobs(self, patch: Mapping[str, float]) -> None:
        """Change live settings, given under their dotted config keys: all of them, or none and a RunError."""
        before = self.trainer.state
        try:
            for key, value in patch.items():
                self.trainer.set(key.rpartition(".")[2], value)
        except RunError:
            self.trainer.state = before
            raise

    async def save(self, directory: Path, *, optimizer: bool = True) -> None:
        """Write the trainer's state into an existing directory."""
        self.trainer.save(directory, optimizer=optimizer)

    async def saved(self, *, wait: bool) -> bool:
        """Whether all that `save` began is on disk; `wait` until it is."""
        return self.trainer.finish_saving(wait=wait)

    async def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        async with self.still:
            self.trainer.load(directory)
