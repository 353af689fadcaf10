"""What the interview may know before a run exists: machine, Ray, checkpoint, profiles, data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from miles.config import Origin, ResolvedConfig
from miles.planning.facts import CheckpointFacts, MachineFacts
from miles_cli.init.questions import Value

Answers = Mapping[str, Value]

DASHBOARD_PORT = 8265
"""Where Ray's job server listens unless told otherwise."""


@dataclass(frozen=True)
class RayFacts:
    """Ray on this machine: whether it is installed, and the cluster that the environment names."""

    installed: bool
    address: str = ""
    reachable: bool | None = None
    """Whether something listens there; None where that cannot be told without Ray itself."""

    @property
    def job_server(self) -> str:
        """Where a run is submitted to: the same host on the dashboard's port, unless it is HTTP already."""
        scheme, separator, rest = self.address.rpartition("://")
        host = rest.rpartition(":")[0]
        if separator and scheme.startswith("http"):
            return self.address
        return f"http://{host}:{DASHBOARD_PORT}" if host else ""

    def __str__(self) -> str:
        if not self.address:
            return "installed, no cluster in RAY_ADDRESS" if self.installed else "not installed"
        state = {True: "reachable", False: "does not answer", None: "not probed"}[self.reachable]
        return f"{self.address} (RAY_ADDRESS) {state}" + ("" if self.installed else ", but not installed")


@dataclass(frozen=True)
class CheckpointLook:
    """A checkpoint: what preflight knows of it, and what only the interview asks."""

    facts: CheckpointFacts
    model_name: str = ""
    """The known architecture with these numbers, such as `qwen3-30b-a3b`."""
    stop_tokens: tuple[tuple[int, str], ...] = ()
    """Ids that end a response, and their text."""

    def __str__(self) -> str:
        spec = self.facts.spec
        if spec is None:
            problem = self.facts.problem or self.facts.spec_problem or "no checkpoint"
            return f"{self.facts.name}: {problem}".removeprefix(": ")
        parts = [f"{spec.architecture}, {spec.num_parameters():,} parameters"]
        if spec.is_moe:
            parts[0] += f" ({spec.num_active_parameters():,} active)"
            parts.append(f"{spec.num_experts} experts, {spec.top_k} per token")
        parts.append(str(self.facts.quantisation or spec.dtype or "type not said"))
        if spec.mtp_num_layers:
            parts.append(f"{spec.mtp_num_layers} MTP layers")
        parts.append("chat template" if self.facts.has_chat_template else "no chat template")
        stops = ", ".join(f"{number} {text!r}" if text else str(number) for number, text in self.stop_tokens)
        return " · ".join([*parts, f"stops at {stops or 'nothing'}"])


@dataclass(frozen=True)
class Columns:
    """The columns of a prompt file, from its first rows."""

    path: str
    problem: str = ""
    num_rows: int = 0
    names: tuple[str, ...] = ()
    messages: frozenset[str] = frozenset()
    """Columns that hold lists of chat messages."""
    texts: Mapping[str, tuple[str, ...]] | None = None
    """The values of every column in the first rows, as text."""


@dataclass(frozen=True)
class DataLook:
    """Lengths and bad rows of a prompt file under its columns, from its first rows."""

    path: str
    problem: str = ""
    measured: int = 0
    unit: str = "tokens"
    median: int = 0
    p99: int = 0
    longest: int = 0
    longest_label: int | None = None
    """Of the expected answers, in the same unit."""
    bad_rows: int = 0
    first_bad: str = ""
    examples: tuple[tuple[str, str | None], ...] = ()
    """Prompt and expected answer of the first rows."""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        bad = f" · {self.bad_rows} bad rows, first: {self.first_bad}" if self.bad_rows else " · no bad rows"
        return (
            f"{self.measured:,} rows measured: median {self.median}, p99 {self.p99}, longest "
            f"{self.longest} {self.unit}{bad}"
        )


class World(Protocol):
    """Looks at things on demand; every look is remembered, so asking twice costs nothing."""

    @property
    def machine(self) -> MachineFacts: ...

    @property
    def ray(self) -> RayFacts: ...

    def recipes(self) -> tuple[str, ...]:
        """Shipped profiles that are whole recipes."""
        ...

    def recipe(self, profile: str) -> ResolvedConfig | None:
        """A profile (or layers separated by commas) resolved; None where it does not resolve."""
        ...

    def note(self, origin: Origin) -> str:
        """The comment above the line of a profile that sets a value; empty where there is none."""
        ...

    def checkpoint(self, name: str) -> CheckpointLook: ...

    def columns(self, path: str) -> Columns: ...

    def data(
        self, path: str, input_key: str, label_key: str, checkpoint: str, chat_template: bool
    ) -> DataLook: ...

    def memory_needed(self, answers: Answers) -> int | None:
        """Bytes that a run with these answers needs; None where they do not make a run yet."""
        ...
