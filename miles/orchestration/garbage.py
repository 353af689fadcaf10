"""Python's garbage collector in a training process looks at what a step made, not at the whole program."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG_OBJECTS = 10_000
"""New containers before the youngest are looked through. A step of small samples makes a few thousand that
live until its end: by Python's own 700 they are looked through several times on their way."""


@contextmanager
def long_lived_objects_kept() -> Iterator[None]:
    """Leave what exists now (modules, the model, the books of the run) out of every collection.

    A full collection walks hundreds of thousands of objects of the libraries, for longer than a step of a
    small model takes. Garbage in cycles that is made from now on is found as before, only later.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
