"""What of a model has no exact numerics: operations whose bits depend on the batch, as they are computed."""

from __future__ import annotations

from miles.arch.spec import ArchSpec


def exact_obstacle(spec: ArchSpec) -> str:
    """What stands in the way of exact numerics; empty where nothing does."""
    if any(layer.attention.indexer is not None for layer in spec.layers):
        return "sparse attention by an indexer"
    if spec.streams is not None:
        return "several residual streams"
    return ""
