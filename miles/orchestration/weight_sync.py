"""Weights from the trainer to the engines, versioned, between two steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from miles.arch.precision import PrecisionPolicy
from miles.errors import RunError
from miles.orchestration.engine_pool import EnginePool, RemoteEngine
from miles.orchestration.train_worker import TrainWorker
from miles.orchestration.weight_packets import WeightsDamaged
from miles.record import RecordWriter
from miles.rollout.native.engine import NativeEngine
from miles.training.native.trainer import NativeTrainer
from miles.weights.low_precision import as_stored

MAX_SENDS = 3
"""Transfers of one version before the run gives up."""


class WeightSync(Protocol):
    """One way for weights to travel."""

    async def send(self, version: int) -> None:
        """Every engine serves `version` when this returns, or an error is raised."""


def weights_for_engine(
    trainer: TrainWorker, policy: PrecisionPolicy | None, everywhere: bool = False
) -> Iterable[tuple[str, Tensor]]:
    """The weights of this moment under published names, as the engine holds them; policy None: as they
    are. `everywhere`: on every rank, not the first alone."""
    weights = trainer.trainer.named_weights(everywhere)
    return weights if policy is None else as_stored(weights, policy)


class SharedWeights:
    """Trainer and engine read the same tensors: one process, one dtype, taking turns."""

    def __init__(self, trainer: TrainWorker, engine: NativeEngine) -> None:
        self._trainer = trainer
        self._engine = engine

    async def send(self, version: int) -> None:
        trainer = self._trainer.trainer
        assert isinstance(trainer, NativeTrainer), "other trainers have no decoder to share"
        await self._engine.share_weights(trainer.decoder, version, trainer.draft)


class RoundedWeights:
    """The engine has weights of its own, in `policy`'s number format or as the trainer has them: one process,
    copied between two steps.
    """

    def __init__(self, trainer: TrainWorker, engine: NativeEngine, policy: PrecisionPolicy | None) -> None:
        self._trainer, self._engine, self._policy = trainer, engine, policy

    async def send(self, version: int) -> None:
        await self._engine.receive_weights(weights_for_engine(self._trainer, self._policy), version)


class EqualWeights:
    """A weight sync after which every engine is asked for a checksum of what it holds."""

    def __init__(
        self, sync: WeightSync, checksums: Callable[[], Awaitable[dict[str, str]]], record: RecordWriter
    ) -> None:
        self._sync, self._checksums, self._record = sync, checksums, record

    async def send(self, version: int) -> None:
        """Raises: RunError when two engines hold different weights."""
        await self._sync.send(version)
        checksums = await self._checksums()
        self._record.event("weights_compared", version=version, checksums=checksums)
        if len(set(checksums.values())) > 1:
            raise RunError(
                f"engines hold different weights of version {version}",
                why=", ".join(f"{name}: {checksum[:12]}" for name, checksum in checksums.items()),
                fix="look at the engines' logs around the last weight update",
            )


class ServedSync(WeightSync, Protocol):
    """A way to engines that are replaced when they are lost."""

    async def catch_up(self, engine: Any) -> None:
        """Give an engine that was started in place of another what it needs before it serves.

        Raises: WorkerLost.
        """


class WeightSource(Protocol):
    """A trainer in another process."""

    async def weights(self, version: int) -> Any:
        """A packet that engines can load, where it is."""


class PacketWeights:
    """Trainer and engines in processes of their own: checked packets through the object store.

    An engine loads a packet between two of its steps, after checking all of it, so it never serves two
    versions at once. `current` is what a replaced engine loads before it serves.
    """

    def __init__(self, trainer: WeightSource, pool: EnginePool, record: RecordWriter) -> None:
        self._trainer, self._pool, self._record = trainer, pool, record
        self.current: Any = None

    async def catch_up(self, engine: RemoteEngine) -> None:
        if self.current is not None:
            await engine.load(self.current)

    async def send(self, version: int) -> None:
        for sends in range(1, MAX_SENDS + 1):
            self.current = await self._trainer.weights(version)
            try:
                await self._pool.receive(self.current)
                return
            except WeightsDamaged as damage:
                self._record.event("weight_sync_failed", version=version, sends=sends, reason=damage.what)
                last = damage
        raise RunError(
            f"weight version {version} could not be handed over in {MAX_SENDS} attempts", why=last.what
        )
