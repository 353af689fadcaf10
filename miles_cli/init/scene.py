"""What is known at one question: the answers before it, and the looks that they lead to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from miles.config import ResolvedConfig
from miles.data.tasks import is_builtin
from miles.planning.facts import MachineFacts
from miles_cli.init.questions import Value
from miles_cli.init.world import CheckpointLook, Columns, DataLook, World


@dataclass(frozen=True)
class Suggestion:
    """A suggested answer, and the reason for it."""

    value: Value
    why: str
    is_fallback: bool = False
    """Whether it only makes sense where the user says nothing."""


@dataclass(frozen=True)
class Scene:
    """The interview as far as it has come. `given` are the user's own answers, to any question."""

    world: World
    given: Mapping[str, Value]
    answers: Mapping[str, Value]

    def text(self, question: str) -> str:
        """An answer as text; empty where there is none."""
        return str(self.answers.get(question, ""))

    def number(self, question: str) -> int | None:
        """An answer that is a whole number."""
        value = self.answers.get(question)
        return value if isinstance(value, int) else None

    @property
    def machine(self) -> MachineFacts:
        return self.world.machine

    @cached_property
    def recipe(self) -> ResolvedConfig | None:
        """The profile that was chosen."""
        return self.world.recipe(self.text("profile")) if self.text("profile") else None

    @cached_property
    def checkpoint(self) -> CheckpointLook | None:
        return self.world.checkpoint(self.text("hf_checkpoint")) if self.text("hf_checkpoint") else None

    @property
    def parameters(self) -> int | None:
        """Parameters of the model, where its config says them."""
        spec = self.checkpoint.facts.spec if self.checkpoint else None
        return spec.num_parameters() if spec else None

    @property
    def positions(self) -> int | None:
        """Most tokens of a sequence."""
        spec = self.checkpoint.facts.spec if self.checkpoint else None
        return spec.max_position_embeddings if spec else None

    @property
    def on_cluster(self) -> bool:
        """Whether the profile runs under Ray."""
        return self.recipe is not None and self.recipe.config.run.executor == "ray"

    @cached_property
    def columns(self) -> Columns | None:
        return self.world.columns(self.text("prompt_data")) if self.text("prompt_data") else None

    @cached_property
    def data(self) -> DataLook | None:
        """Lengths of the prompts, once the columns are known."""
        if not self.text("prompt_data") or not self.text("input_key"):
            return None
        return self.world.data(
            self.text("prompt_data"),
            self.text("input_key"),
            self.text("label_key"),
            self.text("hf_checkpoint"),
            bool(self.answers.get("apply_chat_template")),
        )

    def own_data(self) -> bool:
        """Whether the prompts are a file of the user's, not a built-in set."""
        return bool(self.text("prompt_data")) and not is_builtin(self.text("prompt_data"))

    def from_profile(self, setting: str) -> Suggestion | None:
        """The profile's own value, where it sets one."""
        if self.recipe is None or not self.recipe.is_explicit(setting):
            return None
        origin = self.recipe.origin(setting)
        note = self.world.note(origin)
        return Suggestion(self.recipe.value(setting), f"{note} ({origin})" if note else f"from {origin}")
