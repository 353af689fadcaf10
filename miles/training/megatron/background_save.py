"""A distributed checkpoint that a process beside the trainer writes, through megatron-core's own queue.

The process is forked, so what it writes is the memory of that moment: tensors of a GPU are copied to the host
before, those in host memory are shared with it until the trainer changes them.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from miles.errors import CheckpointError
from miles.training.megatron.torch_dist import dist_checkpointing


class BackgroundSave:
    """At most one checkpoint on its way. Every rank makes the same calls."""

    def __init__(self) -> None:
        dist_checkpointing()
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self._queue = AsyncCallsQueue()

    def start(self, request: Any) -> None:
        """Begin to write; `request`: what `dist_checkpointing.save` returned."""
        assert not self._queue.get_num_unfinalized_calls(), "one checkpoint at a time"
        self._queue.schedule_async_request(request)

    def finish(self, *, wait: bool) -> bool:
        """Whether all ranks have written all; then the checkpoint has its index and is whole. `wait` for it.

        Raises CheckpointError on every rank when one could not write.
        """
        try:
            self._queue.maybe_finalize_async_calls(blocking=wait)
        except CheckpointException as error:
            raise CheckpointError(
                "a checkpoint could not be written in the background",
                why=_first_line(error),
                fix="free space, then go on from the checkpoint before it: miles runs resume",
            ) from error
        return self._queue.get_num_unfinalized_calls() == 0


def _first_line(error: CheckpointException) -> str:
    """What the first rank that failed said; only the first rank is told."""
    for exception, _ in error.failures.values():
        return str(exception)
    return "another rank's disk refused the write; its log says more"
