"""What all tests share: a garbage collector that does not walk a million imported objects again and again."""

from __future__ import annotations

import gc

YOUNG_OBJECTS = 10_000
let_loose = gc.unfreeze
loose = False

gc.disable()


def unfreeze() -> None:
    """As Python's; asking it how much is frozen takes longer than most tests."""
    global loose
    loose = True
    let_loose()


gc.unfreeze = unfreeze


def pytest_collection_finish() -> None:
    """What is here now, modules and tests, stays until the end."""
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    gc.enable()


def pytest_runtest_setup() -> None:
    """A run in this process lets everything loose at its end."""
    global loose
    if loose:
        loose = False
        gc.freeze()
