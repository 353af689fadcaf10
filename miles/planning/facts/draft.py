"""What a draft checkpoint is, and whether it fits the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miles.arch import ArchSpec
from miles.arch.draft_checkpoint import Layout, read_draft
from miles.errors import CheckpointError


@dataclass(frozen=True)
class DraftFacts:
    """A named draft; `layout` is None, with the reason in `problem`, where it cannot serve the model."""

    name: str
    layout: Layout | None
    problem: str = ""


def read_draft_facts(name: str | None, target: ArchSpec | None) -> DraftFacts | None:
    """Facts of `speculative_draft_model_path` from config and headers; None without one, or without a model
    that it could be compared with.
    """
    if name is None or target is None or not Path(name).is_dir():
        return None
    try:
        return DraftFacts(name, read_draft(Path(name), target.policy).layout)
    except CheckpointError as error:
        return DraftFacts(name, None, str(error))
