"""The collector leaves out what was there before a run, and finds what the run leaves behind."""

from __future__ import annotations

import gc
import weakref

from miles.orchestration.garbage import YOUNG_OBJECTS, long_lived_objects_kept


class Knot:
    """Refers to itself: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_new_cycles_are_freed_and_old_ones_afterwards() -> None:
    thresholds = gc.get_threshold()
    old = weakref.ref(Knot())
    with long_lived_objects_kept():
        assert gc.get_threshold()[0] == YOUNG_OBJECTS
        new = weakref.ref(Knot())
        gc.collect()
        assert new() is None
        assert old() is not None, "what exists already is not looked at"
    assert gc.get_threshold() == thresholds
    gc.collect()
    assert old() is None
