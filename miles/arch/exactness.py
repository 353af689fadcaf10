"""What of a model has no exact numerics: operations whose bits depend on the batch, as they are computed."""

from __future__ import annotations

from miles.arch.spec import ArchSpec


def exact_obstacle(spec: ArchSpec) -> str:
    """What stands in the way of exact numerics; empty where nothing does."""
    if spec.streams is not None:
        return "several residual streams"
    return ""
