"""What can be said of a run on GPUs whether or not a rule refuses it: a refusal shows its arithmetic too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from miles.planning.scale import ScalePlan
from miles.planning.subject import Subject


@dataclass(frozen=True)
class Outline:
    """The model and the batch in numbers, and the plan of the GPUs."""

    model: str
    """Where the architecture comes from."""
    parameters: int
    active_parameters: int
    dtype: str
    trainer: str
    engine: str
    samples_per_rollout: int
    samples_per_step: int
    max_context_len: int
    scale: ScalePlan

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        values = {key: value for key, value in vars(self).items() if key != "scale"}
        return values | self.scale.as_dict()


def make_outline(subject: Subject) -> Outline | None:
    """The outline of a run; None where it asks for no GPU, or the model or the batch is not known."""
    request, spec, scale = subject.scale_request, subject.spec, subject.scale
    if request is None or spec is None or scale is None:
        return None
    checkpoint = subject.facts.checkpoint
    shipped = checkpoint.spec is None
    return Outline(
        model=f"{subject.config.model.model_name} (shipped architecture)" if shipped else checkpoint.name,
        parameters=spec.num_parameters(),
        active_parameters=spec.num_active_parameters(),
        dtype=request.dtype,
        trainer=subject.config.training.backend,
        engine=subject.config.rollout.backend,
        samples_per_rollout=request.samples_per_rollout,
        samples_per_step=request.samples_per_step,
        max_context_len=request.max_context_len,
        scale=scale,
    )
