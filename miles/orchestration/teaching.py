"""The teacher of an on-policy distillation: loaded beside the policy, or behind an address."""

from __future__ import annotations

import json
from pathlib import Path

from miles.arch import load_spec
from miles.config import RunConfig
from miles.errors import ConfigError, MilesError
from miles.orchestration.run_model import read_weights
from miles.orchestration.train_worker import AnyTrainer
from miles.rollout.served_teacher import ServedTeachers


def teach(trainer: AnyTrainer, teacher: Path, student: Path) -> None:
    """Load the checkpoint `teacher` into the trainer. `student`: the checkpoint whose tokenizer the run uses.

    Raises ConfigError for a teacher of another vocabulary, CheckpointError for one that cannot be read.
    """
    spec = load_spec(teacher).policy
    _require_one_vocabulary(teacher, spec.vocab_size, student, trainer.spec.vocab_size)
    trainer.load_teacher(spec, read_weights(teacher, spec))


def served_teachers(config: RunConfig) -> ServedTeachers | None:
    """The teachers behind addresses, where the run has such."""
    given = config.distillation
    kind = given.opd_type or ("sglang" if given.opd_teacher_urls else None)
    return ServedTeachers(given.opd_teacher_urls, given.opd_teacher_key) if kind == "sglang" else None


def _require_one_vocabulary(teacher: Path, size: int, student: Path, own_size: int) -> None:
    """Models of one family pad the same vocabulary to different sizes, so tokens are compared where they can
    be.
    """
    tokens, own_tokens = _tokens(teacher), _tokens(student)
    if tokens is None or own_tokens is None:
        same, what = size == own_size, f"{size} tokens, the student has {own_size}"
    else:
        same, what = tokens == own_tokens, "another vocabulary than the student's"
    if not same:
        raise ConfigError(
            MilesError(
                "the teacher cannot read the student's tokens",
                where=f"--opd-teacher-load {teacher}",
                why=f"it has {what}",
                fix="use a teacher with the student's tokenizer",
            )
        )


def _tokens(checkpoint: Path) -> object:
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["model"].get("vocab")
