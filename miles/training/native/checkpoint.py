"""A trainer on disk: an HF checkpoint, optimizer moments under the same published names, counters and knobs.

model/                  loads in transformers and in an engine; in the trained dtype, so nothing is rounded
optimizer/              exp_avg.safetensors, exp_avg_sq.safetensors; master.safetensors unless fp32 is trained
critic/                 the critic of PPO, where there is one: model/ and optimizer/ of its own
trainer_state.json      step, updates, knobs in effect and as configured

The files do not depend on the number of ranks that wrote them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from miles.arch import ArchSpec, load_spec
from miles.errors import CheckpointError
from miles.training.knobs import Knobs
from miles.training.native.optimizer import MOMENTS, MasterAdamW
from miles.training.native.state import CriticProgress, TrainerState
from miles.training.native.tensor_layout import TensorLayout
from miles.weights.hf import TORCH_DTYPES, read_hf, write_hf
from miles.weights.native_map import joint, published_shapes, without_spare_mtp
from miles.weights.safetensors_io import read_tensors, stream_tensors

MODEL_DIR = "model"
OPTIMIZER_DIR = "optimizer"
CRITIC_DIR = "critic"
STATE_FILE = "trainer_state.json"
MASTER = "master"


@dataclass(frozen=True)
class TrainerTensors:
    """What of a trainer goes to disk as tensors, and how it lies in memory."""

    spec: ArchSpec
    parameters: Mapping[str, Tensor]
    optimizer: MasterAdamW
    dtype: torch.dtype
    """The trained format; the parameters themselves may be its fp32 masters."""
    layout: TensorLayout
    draft_optimizer: MasterAdamW | None = None
    """That of the MTP layers, where they are trained."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model under published names, as an engine runs it."""
        return self.layout.published(self.spec, self.parameters, self.dtype)

    def optimizer_state(self, with_draft: bool) -> dict[str, Mapping[str, Tensor]]:
        """Live native-named tensors by the name of their file."""
        tensors = self._state_of(self.optimizer)
        if not with_draft:
            return tensors
        assert self.draft_optimizer is not None
        drafts = self._state_of(self.draft_optimizer)
        return {name: joint(native, drafts[name]) for name, native in tensors.items()}

    def _state_of(self, optimizer: MasterAdamW) -> dict[str, Mapping[str, Tensor]]:
        tensors: dict[str, Mapping[str, Tensor]] = {m: optimizer.moments(m) for m in MOMENTS}
        if self.dtype != torch.float32:
            tensors[MASTER] = optimizer.masters
        return tensors


def save_checkpoint(
    directory: Path,
    tensors: TrainerTensors,
    state: TrainerState,
    source_dir: Path | None,
    *,
    optimizer: bool = True,
    critic: TrainerTensors | None = None,
) -> None:
    """Write into an existing directory; only the rank that writes needs it. Without `optimizer` the moments
    are left out.

    Ranks that do not write give their shards; when writing fails, it is the writing rank that raises.
    """
    models = [_Outgoing.of(directory, tensors, optimizer)]
    if critic is not None:
        models.append(_Outgoing.of(directory / CRITIC_DIR, critic, optimizer))
    with ExitStack() as stack:
        # Whatever happens to this rank's disk, the others' gathers are answered: they would wait forever.
        for stream in reversed([stream for model in models for stream in model.in_order]):
            stack.callback(deque, stream, maxlen=0)
        if not tensors.layout.writes:
            return
        if critic is not None:
            (directory / CRITIC_DIR).mkdir()
        for model in models:
            model.write(source_dir)
        (directory / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Outgoing:
    """One model on its way to `directory`: streams of published tensors, of which each may be read once."""

    directory: Path
    tensors: TrainerTensors
    weights: Iterator[tuple[str, Tensor]]
    moments_spec: ArchSpec
    states: Mapping[str, Mapping[str, Tensor]]
    """Empty where the optimizer is left out."""
    streams: Mapping[str, Iterator[tuple[str, Tensor]]]
    """Of `states`."""

    @classmethod
    def of(cls, directory: Path, tensors: TrainerTensors, optimizer: bool) -> _Outgoing:
        with_draft = tensors.draft_optimizer is not None
        spec = tensors.spec if with_draft else tensors.spec.policy
        states = tensors.optimizer_state(with_draft) if optimizer else {}
        streams = {name: tensors.layout.published(spec, native) for name, native in states.items()}
        return cls(directory, tensors, tensors.weights(), spec, states, streams)

    @property
    def in_order(self) -> list[Iterator[tuple[str, Tensor]]]:
        return [self.weights, *self.streams.values()]

    def write(self, source_dir: Path | None) -> None:
        dtype = self.tensors.dtype
        stored = next(name for name, each in TORCH_DTYPES.items() if each == dtype)
        write_hf(self.directory / MODEL_DIR, self.tensors.spec, self.weights, source_dir, stored)
        if self.states:
            (self.directory / OPTIMIZER_DIR).mkdir()
        for name, stream in self.streams.items():
            shapes = published_shapes(self.moments_spec, self.states[name])
            forms = {published: (shape, torch.float32) for published, shape in shapes.items()}
            stream_tensors(self.directory / OPTIMIZER_DIR / f"{name}.safetensors", forms, stream)


def load_checkpoint(
    directory: Path, tensors: TrainerTensors, critic: TrainerTensors | None = None
) -> TrainerState:
    """Fill model and optimizer from what `save_checkpoint` wrote and return the state.

    MTP layers that were not trained before start with fresh moments; moments of those that are no longer
    trained, and MTP layers that this run does without, are left out. So is a critic; one that the checkpoint
    does not hold stays as it is, and warms up.

    Raises CheckpointError for a missing or damaged part.
    """
    state = read_state(directory / STATE_FILE)
    model_dir, spec = directory / MODEL_DIR, tensors.spec
    saved = load_spec(model_dir)
    items = without_spare_mtp(saved, spec, read_hf(model_dir))
    tensors.layout.load(spec, tensors.parameters, items, where=str(model_dir))
    if tensors.draft_optimizer is not None:
        tensors.draft_optimizer.reset_masters()
    had_draft = state.draft_updates is not None
    with_draft = had_draft and tensors.draft_optimizer is not None
    _load_optimizer(directory / OPTIMIZER_DIR, tensors, saved if had_draft else saved.policy, with_draft)
    tensors.optimizer.set_updates(state.updates)
    state = replace(state, critic=_load_critic(directory / CRITIC_DIR, critic, state.critic))
    if tensors.draft_optimizer is None:
        return replace(state, draft_updates=None)
    tensors.draft_optimizer.set_updates(state.draft_updates or 0)
    return replace(state, draft_updates=state.draft_updates or 0)


def _load_critic(
    directory: Path, critic: TrainerTensors | None, saved: CriticProgress | None
) -> CriticProgress | None:
    if critic is None:
        return None
    if saved is None:
        return CriticProgress()
    model_dir = directory / MODEL_DIR
    critic.layout.load(critic.spec, critic.parameters, read_hf(model_dir), where=str(model_dir))
    _load_optimizer(directory / OPTIMIZER_DIR, critic, critic.spec, with_draft=False)
    critic.optimizer.set_updates(saved.updates)
    return saved


def _load_optimizer(directory: Path, tensors: TrainerTensors, saved: ArchSpec, with_draft: bool) -> None:
    """`saved`: the model whose moments the files hold."""
    require_optimizer(directory)
    spec = tensors.spec if with_draft else tensors.spec.policy
    for name, native in tensors.optimizer_state(with_draft).items():
        path = directory / f"{name}.safetensors"
        items = without_spare_mtp(saved, spec, read_tensors(path))
        tensors.layout.load(spec, native, items, where=str(path))


def require_optimizer(directory: Path) -> None:
    """Raises CheckpointError for a checkpoint whose optimizer's part is not there."""
    if not directory.is_dir():
        raise CheckpointError(
            "the checkpoint holds no optimizer state",
            where=str(directory),
            why="it was saved with checkpoint.no_save_optim",
            fix="start a new run from its model directory instead of resuming",
        )


def read_state(path: Path) -> TrainerState:
    """Counters and knobs of a checkpoint. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(
            "not a trainer checkpoint: trainer_state.json is missing", where=str(path.parent)
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        critic = saved["critic"]
        return TrainerState(
            knobs=Knobs(**saved["knobs"]),
            configured=Knobs(**saved["configured"]),
            step=saved["step"],
            updates=saved["updates"],
            draft_updates=saved["draft_updates"],
            critic=None if critic is None else CriticProgress(**critic),
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"trainer_state.json cannot be read: {error}", where=str(path)) from error
