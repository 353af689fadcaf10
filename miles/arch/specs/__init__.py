"""Public models by name: the `config.json` each was published with, to plan runs without the weights.

>>> shipped_spec("qwen3-30b-a3b").num_layers
48
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from miles.arch.checkpoint import spec_from_hf_config
from miles.arch.spec import ArchSpec

DIRECTORY = Path(__file__).parent


@cache
def shipped_names() -> tuple[str, ...]:
    """The models that `--model-name` can name, small ones first within a family."""
    return tuple(sorted((path.stem for path in DIRECTORY.glob("*.json")), key=_family_then_size))


@cache
def shipped_spec(name: str) -> ArchSpec:
    """The architecture of a shipped model. Raises `KeyError` for any other name."""
    if name not in shipped_names():
        raise KeyError(name)
    path = DIRECTORY / f"{name}.json"
    return spec_from_hf_config(json.loads(path.read_text(encoding="utf-8")), where=path.name)


def _family_then_size(name: str) -> tuple[str, float]:
    """Some models are known by their name alone: `deepseek-v3`."""
    found = re.fullmatch(r"(.+?)-e?([\d.]+)b(?:-.*)?", name)
    return (found[1], float(found[2])) if found else (name, 0.0)
