"""Every preflight rule; importing this package registers them."""

from __future__ import annotations

from miles.planning.rules import (
    algorithm,
    alignment,
    batching,
    capability,
    cluster,
    data,
    decoding,
    gpu_memory,
    int4,
    layout,
    limits,
    model,
    placement,
    precision,
    precision_policy,
    resources,
    server,
    speculation,
    start,
    starting_weights,
    versions,
)
from miles.planning.rules.rule import REGISTRY, Rule

__all__ = [
    "REGISTRY",
    "Rule",
    "algorithm",
    "alignment",
    "batching",
    "capability",
    "cluster",
    "data",
    "decoding",
    "gpu_memory",
    "int4",
    "layout",
    "limits",
    "model",
    "placement",
    "precision",
    "precision_policy",
    "resources",
    "server",
    "speculation",
    "start",
    "starting_weights",
    "versions",
]
