"""What a step of a run holds beside its weights: an optimizer's state under published names, counters, data.

step-000020/trainer/model/…                     the weights, a Hugging Face checkpoint
step-000020/trainer/optimizer/exp_avg.safetensors, …   moments and master weights, one file each
step-000020/loop_state.json, …                  everything else

In a distributed checkpoint moments are keys `optimizer.exp_avg.NAME`; the other files lie in `run_state/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from miles.arch.precision import NumberFormat
from miles.arch.safetensors_header import TensorEntry, read_header
from miles.arch.stored_weights import StoredWeight
from miles.weights.file_manifest import STEP_MANIFEST

PREFIX = "optimizer."
STATE_DIR = "run_state"
MODEL_DIR, OPTIMIZER_DIR = "trainer/model", "trainer/optimizer"
"""Inside a step."""
_OWN = (f"{MODEL_DIR}/", f"{OPTIMIZER_DIR}/", STEP_MANIFEST, "miles_convert.json")


@dataclass(frozen=True)
class RunState:
    """Empty for a checkpoint that is no step of a run."""

    moments: Mapping[str, StoredWeight] = field(default_factory=dict)
    """By `optimizer.MOMENT.NAME`; the single part of each has the name that it has in the model."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The other files by their path inside a step."""

    @property
    def tensor_files(self) -> set[Path]:
        return {entry.file for weight in self.moments.values() for entry in weight.parts.values()}


def split_key(key: str) -> tuple[str, str]:
    """`optimizer.exp_avg.model.norm.weight` -> `exp_avg`, `model.norm.weight`."""
    moment, _, name = key.removeprefix(PREFIX).partition(".")
    return moment, name


def state_of_step(step: Path) -> RunState:
    """The state in a step of a run's checkpoints."""
    moments = {}
    for path in sorted((step / OPTIMIZER_DIR).glob("*.safetensors")):
        for name, entry in read_header(path).items():
            key = f"{PREFIX}{path.stem}.{name}"
            moments[key] = _moment(key, entry)
    return RunState(moments, {name: path for name, path in _files(step) if not name.startswith(_OWN)})


def state_of_dcp(directory: Path, entries: Mapping[str, TensorEntry]) -> RunState:
    """The state in a distributed checkpoint that was made from a step. `entries`: its tensors by key."""
    moments = {key: _moment(key, entry) for key, entry in entries.items() if key.startswith(PREFIX)}
    return RunState(moments, dict(_files(directory / STATE_DIR)))


def _moment(key: str, entry: TensorEntry) -> StoredWeight:
    return StoredWeight(key, entry.shape, NumberFormat("fp32"), {split_key(key)[1]: entry})


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return ((path.relative_to(directory).as_posix(), path) for path in paths)
