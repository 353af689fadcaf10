"""What SGLang servers say of themselves, once a step, into the run record."""

from __future__ import annotations

import math

from miles.orchestration.engine_pool import EnginePool
from miles.orchestration.sglang_servers import WEIGHT_BYTES
from miles.orchestration.weight_sync import WeightSync
from miles.record import RecordWriter

KEPT = (
    "cache_hit_rate",
    "gen_throughput",
    "generation_tokens_total",
    "num_queue_reqs",
    "num_retracted_reqs",
    "num_running_reqs",
    "prompt_tokens_total",
    "spec_accept_length",
    "spec_accept_rate",
    "token_usage",
    WEIGHT_BYTES,
)
"""Of some sixty gauges and counters; names are SGLang's, but for the last one."""


class GaugedWeights:
    """A weight sync before which every server's gauges are read: they tell of the rollout that ended.

    A server without `--enable-metrics` tells only what it was sent.
    """

    def __init__(self, sync: WeightSync, pool: EnginePool, record: RecordWriter) -> None:
        self._sync, self._pool, self._record = sync, pool, record

    async def send(self, version: int) -> None:
        for rank, gauges in enumerate(await self._pool.measurements()):
            kept = {name: gauges[name] for name in KEPT if math.isfinite(gauges.get(name, math.nan))}
            if kept:
                self._record.event("engine_gauges", engine=f"engine-{rank}", version=version, gauges=kept)
        await self._sync.send(version)
