"""A closer look at a checkpoint: the text of its stop tokens, and the name of the model."""

from __future__ import annotations

from miles.arch import ArchSpec
from miles.data.tokenizer import CheckpointTokenizer
from miles.planning.facts.checkpoint import read_checkpoint
from miles.planning.model_names import model_names
from miles_cli.init.world import CheckpointLook


def look_at_checkpoint(name: str) -> tuple[CheckpointLook, CheckpointTokenizer | None]:
    """What the interview says about a checkpoint, and its tokenizer."""
    facts, tokenizer = read_checkpoint(name or None)
    if facts.spec is None:
        return CheckpointLook(facts), tokenizer
    look = CheckpointLook(
        facts,
        model_name=_model_name(facts.spec),
        stop_tokens=tuple((i, tokenizer.decode([i]) if tokenizer else "") for i in facts.spec.eos_token_ids),
    )
    return look, tokenizer


def _model_name(spec: ArchSpec) -> str:
    """The known model with exactly these numbers."""
    return next(
        (
            name
            for name, numbers in model_names().items()
            if all(getattr(spec, key) == value for key, value in numbers.items())
        ),
        "",
    )
