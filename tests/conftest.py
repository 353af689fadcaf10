"""What all tests share: a garbage collector that does not walk a million imported objects again and again."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 10_000

gc.disable()


def pytest_collection_finish() -> None:
    """What is here now, modules and tests, stays until the end."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    gc.enable()


def pytest_runtest_setup() -> None:
    """A run in this process lets everything loose at its end."""
    if gc.get_freeze_count() == 0:
        gc.freeze()
