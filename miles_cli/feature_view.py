"""The capability matrix as text and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from miles.planning.capabilities import capabilities
from miles.planning.features import Feature
from miles.planning.hardware import GENERATIONS

IMPOSSIBLE = "-"


def feature_dict(feature: Feature) -> dict[str, Any]:
    """JSON-able values: the state of every cell that the feature concerns."""
    return {
        "feature": feature.name,
        "title": feature.title,
        "hardware": sorted(feature.hardware),
        "instead": feature.instead,
        "state": {
            f"{kind}.{name}": {
                generation: str(feature.state(kind, name, generation)) for generation in GENERATIONS
            }
            for kind, name in _parts(feature)
        },
    }


def feature_lines(features: Iterable[Feature]) -> Iterator[str]:
    """One line per feature and backend; `-` where the hardware cannot do it at all."""
    yield f"{'feature':<16} {'backend':<18} " + " ".join(f"{name:<12}" for name in GENERATIONS).rstrip()
    for feature in features:
        for kind, name in _parts(feature):
            cells = (
                str(feature.state(kind, name, generation)) if generation in feature.hardware else IMPOSSIBLE
                for generation in GENERATIONS
            )
            row = " ".join(f"{cell:<12}" for cell in cells).rstrip()
            yield f"{feature.name:<16} {name + ' ' + kind:<18} {row}"


def _parts(feature: Feature) -> list[tuple[str, str]]:
    return [key for key in capabilities().parts if key[0] in feature.concerns]
