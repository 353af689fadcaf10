"""Files and directories that a run file names besides its checkpoint and its data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from miles.config import RunConfig
from miles.data.tasks import is_builtin
from miles.planning.facts.hooks import hook_files


@dataclass(frozen=True)
class MissingPath:
    """A setting that names something which is not there."""

    setting: str
    path: str
    expected: str
    """What should be there: a file or a directory."""


def missing_paths(config: RunConfig) -> tuple[MissingPath, ...]:
    """Every named path that leads nowhere."""
    return tuple(missing for missing in _named(config) if not _there(missing))


def _named(config: RunConfig) -> Iterator[MissingPath]:
    model, template = config.model, config.data.chat_template_path
    named = (
        ("model.load", model.load),
        ("model.ref_load", model.ref_load),
        ("critic.critic_load", config.critic.critic_load),
        ("distillation.opd_teacher_load", config.distillation.opd_teacher_load),
        ("sglang.speculative_draft_model_path", config.sglang.speculative_draft_model_path),
    )
    for setting, checkpoint in named:
        if checkpoint is not None and not is_builtin(checkpoint):
            yield MissingPath(setting, checkpoint, "a directory")
    if template is not None:
        yield MissingPath("data.chat_template_path", template, "a file")
    for setting, place, _ in hook_files(config):
        yield MissingPath(setting, place, "a file")


def _there(named: MissingPath) -> bool:
    path = Path(named.path).expanduser()
    return path.is_dir() if named.expected == "a directory" else path.is_file()
