"""The precision policy as text and JSON: every published tensor, alike ones on one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from miles.arch import published_tensors
from miles.arch.precision import PrecisionPolicy, TensorPrecision
from miles.config import ResolvedConfig
from miles.errors import ConfigError, MilesError
from miles.planning.facts import collect_facts
from miles.planning.subject import Subject

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def tensor_precisions(
    resolved: ResolvedConfig, part: str | None
) -> tuple[PrecisionPolicy, tuple[TensorPrecision, ...]]:
    """The policy of a configuration and what it says of each tensor, or of those whose names hold `part`.

    Raises ConfigError where the configuration names no model that can be read, or `part` no tensor of it.
    """
    subject = Subject(resolved, collect_facts(resolved.config))
    policy, spec = subject.precision, subject.spec
    if policy is None or spec is None:
        problem = "the precision of each tensor depends on the model, which is not known"
        why = subject.facts.checkpoint.spec_problem
        raise ConfigError(MilesError(problem, why=why, fix="set model.hf_checkpoint or model.model_name"))
    names = [name for name in published_tensors(policy.layout(spec)) if part is None or part in name]
    if not names:
        raise ConfigError(MilesError(f"no tensor of {spec.architecture} has {part!r} in its name"))
    return policy, policy.all_of(names)


def precision_dict(policy: PrecisionPolicy, tensors: Iterable[TensorPrecision]) -> dict[str, Any]:
    """JSON-able values: the two formats, the exceptions, and every tensor."""
    return {
        "rollout": str(policy.rollout),
        "training": str(policy.training),
        "plain": policy.plain,
        "first_layers": policy.first_layers,
        "last_layers": policy.last_layers,
        "kept": list(policy.kept),
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "storage": str(tensor.storage),
                "compute": str(tensor.compute),
                "reason": tensor.reason,
            }
            for tensor in tensors
        ],
    }


def precision_lines(policy: PrecisionPolicy, tensors: Iterable[TensorPrecision]) -> Iterator[str]:
    """A line for tensors that differ in layer and expert only, with how many they are."""
    yield f"stored in the engine and by weight sync: {policy.rollout}"
    yield f"computed by the trainer: {policy.training}"
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for tensor in tensors:
        key = (_NUMBER.sub("*", tensor.name), str(tensor.storage), str(tensor.compute), tensor.reason)
        groups.setdefault(key, []).append(tensor.name)
    rows = [(_ranged(names), str(len(names)), *key[1:]) for key, names in groups.items()]
    head = ("tensor", "count", "stored", "computed", "why")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _ranged(names: list[str]) -> str:
    """`model.layers.0-47.mlp.experts.0-127.up_proj.weight`; lists of numbers where they have gaps."""
    columns = zip(*([int(n) for n in _NUMBER.findall(name)] for name in names), strict=True)
    spans = iter([_span(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(spans), names[0])


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return "{" + ",".join(map(str, numbers)) + "}"
