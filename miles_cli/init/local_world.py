"""The world as this machine shows it; every look is remembered."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from miles import environment
from miles.config import Origin, ResolvedConfig, resolve, shipped_names
from miles.data.tasks import is_builtin, resolve_builtin
from miles.data.tokenizer import CheckpointTokenizer
from miles.errors import ConfigError
from miles.planning.facts import Facts, MachineFacts, collect_facts
from miles.planning.facts.machine import read_machine
from miles.planning.subject import Subject
from miles_cli.init.checkpoint_look import look_at_checkpoint
from miles_cli.init.data_look import look_at_columns, look_at_data
from miles_cli.init.profile_notes import comment_above
from miles_cli.init.ray_facts import read_ray
from miles_cli.init.run_file import minimal
from miles_cli.init.world import Answers, CheckpointLook, Columns, DataLook, RayFacts

OTHER_SECTIONS = ("algorithm", "correction", "engine", "optimizer")
"""The sections of a run file that no fact is collected for."""


class LocalWorld:
    """Looks at this machine and its files. `target` is where the run file will be."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._recipes: dict[str, ResolvedConfig | None] = {}
        self._checkpoints: dict[str, tuple[CheckpointLook, CheckpointTokenizer | None]] = {}
        self._columns: dict[str, Columns] = {}
        self._data: dict[tuple[str, str, str, str, bool], DataLook] = {}
        self._facts: dict[str, Facts] = {}

    @cached_property
    def machine(self) -> MachineFacts:
        return read_machine(environment.runs_dir())

    @cached_property
    def ray(self) -> RayFacts:
        return read_ray()

    def recipes(self) -> tuple[str, ...]:
        return tuple(name for name in shipped_names() if "/" not in name)

    def recipe(self, profile: str) -> ResolvedConfig | None:
        if profile not in self._recipes:
            self._recipes[profile] = self._resolved(minimal({"profile": profile}))
        return self._recipes[profile]

    def note(self, origin: Origin) -> str:
        return comment_above(origin)

    def checkpoint(self, name: str) -> CheckpointLook:
        return self._checkpoint(name)[0]

    def _checkpoint(self, name: str) -> tuple[CheckpointLook, CheckpointTokenizer | None]:
        if name not in self._checkpoints:
            look, tokenizer = look_at_checkpoint(name)
            if is_builtin(name) and look.facts.spec is not None:
                tokenizer = CheckpointTokenizer(resolve_builtin(name))
            self._checkpoints[name] = look, tokenizer
        return self._checkpoints[name]

    def columns(self, path: str) -> Columns:
        if path not in self._columns:
            self._columns[path] = look_at_columns(path)
        return self._columns[path]

    def data(
        self, path: str, input_key: str, label_key: str, checkpoint: str, chat_template: bool
    ) -> DataLook:
        key = (path, input_key, label_key, checkpoint, chat_template)
        if key not in self._data:
            tokenizer = self._checkpoint(checkpoint)[1] if checkpoint else None
            self._data[key] = look_at_data(path, input_key, label_key, tokenizer, chat_template)
        return self._data[key]

    def facts(self, resolved: ResolvedConfig, ask_cluster: bool = True) -> Facts:
        """Facts of a run, collected once for all that would give the same.

        Raises MilesError for a cluster that does not answer, unless it is not to be asked.
        """
        key = f"{ask_cluster} {resolved.config.model_dump_json(exclude=set(OTHER_SECTIONS))}"
        if key not in self._facts:
            self._facts[key] = collect_facts(resolved.config, in_cluster=not ask_cluster)
        return self._facts[key]

    def memory_needed(self, answers: Answers) -> int | None:
        resolved = self._resolved(minimal(answers))
        memory = Subject(resolved, self.facts(resolved, ask_cluster=False)).memory if resolved else None
        return memory.total_bytes if memory else None

    def _resolved(self, text: str) -> ResolvedConfig | None:
        try:
            return resolve(run_file=self._target, run_text=text)
        except ConfigError:
            return None
