"""What `--model-name` names: the shipped architectures, by the numbers that tell models apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from miles.arch import ArchSpec, MoeSpec
from miles.arch.specs import shipped_names, shipped_spec

IDENTITY = ("family", "num_layers", "hidden_size", "num_experts")
"""Attributes of ArchSpec that no two shipped models share all of."""


@cache
def model_names() -> Mapping[str, Mapping[str, str | int]]:
    """The identity of each known model; the keys are attributes of ArchSpec."""
    return {name: {key: getattr(shipped_spec(name), key) for key in IDENTITY} for name in shipped_names()}


def differences(spec: ArchSpec, name: str) -> list[str]:
    """Where a checkpoint's architecture is not that of a known model, number by number."""
    mine, named = _numbers(spec), _numbers(shipped_spec(name))
    return [
        f"{key} {mine.get(key, 'absent')}, {name} has {value}"
        for key, value in named.items()
        if mine.get(key) != value
    ]


def _numbers(spec: ArchSpec) -> dict[str, str | int | float]:
    """What the field compares between a launch script and a checkpoint, and the family."""
    attention, mlp = spec.layers[0].attention, spec.layers[-1].mlp
    numbers: dict[str, str | int | float] = {key: getattr(spec, key) for key in IDENTITY}
    return numbers | {
        "vocab_size": spec.vocab_size,
        "attention heads": attention.num_heads,
        "key-value heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "expert width" if isinstance(mlp, MoeSpec) else "MLP width": mlp.intermediate_size,
        "top_k": spec.top_k,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": attention.rope.theta,
    }
