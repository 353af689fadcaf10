"""How old samples may be in a run whose engines never pause, and how much work that bound allows to begin.

A weight version is the number of the step that made it. Step s trains the weights of step s - 1, so a sample
whose oldest token was made by version v is s - 1 - v versions old in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from miles.data.sample import Sample, SampleStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSettings:
    """What bounds the work that is begun. All amounts are prompt groups.

    `rollout_batch_size` groups are a step; `max_in_flight` are asked of the engines at once; `capacity` is
    how many are in flight or finished and not taken. `max_staleness`: in weight versions, None: no bound.
    `retry_stale`: the prompt of a group that grew too old goes back, else it is dropped with the group.
    """

    rollout_batch_size: int
    max_in_flight: int
    capacity: int
    max_staleness: int | None = None
    retry_stale: bool = True

    def __post_init__(self) -> None:
        assert 1 <= self.rollout_batch_size <= self.capacity
        assert self.max_in_flight >= 1


def room(
    settings: FlowSettings, *, in_flight: int, waiting: int, step: int, last_step: int, version: int
) -> int:
    """How many groups may begin now, under weights `version`, while `step` takes the next batch.

    `waiting`: groups in flight or finished. Where batches are taken in the order in which groups began, one
    that begins now is trained on in step `step + waiting // rollout_batch_size`, where it is to be at most
    `max_staleness` versions old (AReaL's admission, https://arxiv.org/abs/2505.24298). Nothing begins that no
    step is left for.
    """
    batch = settings.rollout_batch_size
    limits = [
        settings.max_in_flight - in_flight,
        settings.capacity - waiting,
        (last_step - step + 1) * batch - waiting,
    ]
    if settings.max_staleness is not None:
        behind = step - 1 - version
        limits.append((settings.max_staleness - behind + 1) * batch - waiting)
    return max(min(limits), 0)


def oldest_version(group: Sequence[Sample], begun_under: int) -> int:
    """Of the weights that made a token of the group; `begun_under` where none was recorded."""
    recorded = (sample.oldest_weight_version for sample in group)
    return min((version for version in recorded if version is not None), default=begun_under)


def age(version: int, step: int) -> int:
    """Weight versions between a sample and the weights that `step` trains. A resumed run's may be newer."""
    return max(step - 1 - version, 0)


def as_prompts(group: Sequence[Sample]) -> list[Sample]:
    """The group as it was drawn, with nothing generated."""
    return [_as_prompt(sample) for sample in group]


def _as_prompt(sample: Sample) -> Sample:
    if sample.status is SampleStatus.PENDING:
        return sample
    return replace(
        Sample(sample.prompt),
        tokens=sample.tokens[: sample.prompt_length],
        label=sample.label,
        metadata=sample.metadata,
        group_index=sample.group_index,
        index=sample.index,
    )
