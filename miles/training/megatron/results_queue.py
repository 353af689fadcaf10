"""megatron-core's queue of what a save has written, in a process that ends when the trainer is gone.

Its own would outlive a trainer that is killed. The process is spawned: this module imports nothing heavy.
"""

from __future__ import annotations

import os
import threading
import time
from functools import cache
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from typing import Any

SECONDS = 1.0
"""Between two looks for the trainer."""


@cache
def results_queue() -> Any:
    """The queue, in place of `filesystem_async._get_write_results_queue`; one for all saves."""
    manager = SyncManager(ctx=get_context("spawn"))
    manager.start(_end_with, (os.getpid(),))
    return manager.Queue()


def _end_with(parent: int) -> None:
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os._exit(1)
