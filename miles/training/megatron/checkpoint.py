"""A Megatron trainer on disk, in the native trainer's form: everything under published names.

model/                  an HF checkpoint in the trained dtype
optimizer/              exp_avg.safetensors, exp_avg_sq.safetensors; master.safetensors unless fp32 is trained
critic/                 the critic of PPO, where there is one: model/ and optimizer/ of its own
trainer_state.json      step, updates, knobs in effect and as configured

The files do not depend on the layout that wrote them, nor on the trainer: a run goes on from them on any.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miles.arch import ArchSpec, load_spec
from miles.training.megatron.optimizer import MOMENTS, MasterAdam
from miles.training.megatron.tensors import MegatronTensors, OfParameter
from miles.training.native.checkpoint import (
    CRITIC_DIR,
    MASTER,
    MODEL_DIR,
    OPTIMIZER_DIR,
    STATE_FILE,
    read_state,
    require_optimizer,
)
from miles.training.native.state import CriticProgress, TrainerState
from miles.weights.hf import TORCH_DTYPES, read_hf, write_hf
from miles.weights.native_map import without_spare_mtp
from miles.weights.safetensors_io import read_tensors, stream_tensors


@dataclass(frozen=True)
class TrainerTensors:
    """What of a trainer goes to disk as tensors: the whole model, the part of it that has moments, and whose
    those are. `draft`: that of the MTP layers, where they are trained.
    """

    spec: ArchSpec
    model: MegatronTensors
    trained_spec: ArchSpec
    trained: MegatronTensors
    optimizer: MasterAdam
    draft: MasterAdam | None

    def optimizer_state(self) -> dict[str, OfParameter]:
        """Live fp32 tensors of a parameter by the name of their file."""

        def moment(name: str) -> OfParameter:
            return lambda parameter: self._owner(parameter).moment(parameter, name)

        state: dict[str, OfParameter] = {name: moment(name) for name in MOMENTS}
        if self.optimizer.dtype != torch.float32:
            state[MASTER] = lambda parameter: self._owner(parameter).master(parameter)
        return state

    def _owner(self, parameter: nn.Parameter) -> MasterAdam:
        if self.draft is not None and self.draft.holds(parameter):
            return self.draft
        return self.optimizer


def save_checkpoint(
    directory: Path,
    tensors: TrainerTensors,
    state: TrainerState,
    source_dir: Path | None,
    *,
    with_optimizer: bool,
    critic: TrainerTensors | None = None,
) -> None:
    """Write into an existing directory. The first rank writes, the others give their shards; when writing
    fails, it is the first that raises.
    """
    models = [_Outgoing.of(directory, tensors, with_optimizer)]
    if critic is not None:
        models.append(_Outgoing.of(directory / CRITIC_DIR, critic, with_optimizer))
    with ExitStack() as stack:
        # Whatever happens to this rank's disk, the others' gathers are answered: they would wait forever.
        for stream in reversed([stream for model in models for stream in model.in_order]):
            stack.callback(deque, stream, maxlen=0)
        if dist.get_rank() != 0:
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
    streams: Mapping[str, Iterator[tuple[str, Tensor]]]
    """Of the optimizer's state; empty where that is left out."""

    @classmethod
    def of(cls, directory: Path, tensors: TrainerTensors, with_optimizer: bool) -> _Outgoing:
        states = tensors.optimizer_state() if with_optimizer else {}
        streams = {
            name: tensors.trained.published(torch.float32, of, shared=tensors.optimizer.shares)
            for name, of in states.items()
        }
        return cls(directory, tensors, tensors.model.published(tensors.optimizer.dtype), streams)

    @property
    def in_order(self) -> list[Iterator[tuple[str, Tensor]]]:
        return [self.weights, *self.streams.values()]

    def write(self, source_dir: Path | None) -> None:
        dtype = self.tensors.optimizer.dtype
        stored = next(name for name, form in TORCH_DTYPES.items() if form == dtype)
        write_hf(self.directory / MODEL_DIR, self.tensors.spec, self.weights, source_dir, stored)
        if self.streams:
            (self.directory / OPTIMIZER_DIR).mkdir()
        forms = {name: (shape, torch.float32) for name, shape in self.tensors.trained.shapes.items()}
        for name, stream in self.streams.items():
            stream_tensors(self.directory / OPTIMIZER_DIR / f"{name}.safetensors", forms, stream)


def load_checkpoint(
    directory: Path,
    tensors: TrainerTensors,
    policy: MegatronTensors,
    critic: TrainerTensors | None = None,
) -> TrainerState:
    """Fill model and optimizer from what any trainer's `save` wrote and return the state. Every rank reads
    its own part of the files.

    MTP layers that were not trained before start with fresh moments; moments of those that are no longer
    trained, and MTP layers that this run does without, are left out. So is a critic; one that the checkpoint
    does not hold stays as it is, and warms up. `policy`: the model without MTP layers.

    Raises CheckpointError for a missing or damaged part.
    """
    state = read_state(directory / STATE_FILE)
    saved = _load_model(directory, tensors)
    if tensors.draft is not None:
        tensors.draft.reset_masters()
    had_draft, trains_draft = state.draft_updates is not None, tensors.trained_spec.mtp is not None
    _load_optimizer(
        directory,
        tensors,
        tensors.trained if had_draft else policy,
        held=saved if had_draft else saved.policy,
        kept=tensors.trained_spec if had_draft else tensors.spec.policy,
    )
    tensors.optimizer.set_updates(state.updates)
    if tensors.draft is not None:
        tensors.draft.set_updates(state.draft_updates or 0)
    return replace(
        state,
        draft_updates=state.draft_updates or 0 if trains_draft else None,
        critic=_load_critic(directory / CRITIC_DIR, critic, state.critic),
    )


def _load_model(directory: Path, tensors: TrainerTensors) -> ArchSpec:
    """Weights into model and masters; what was saved."""
    model_dir = directory / MODEL_DIR
    saved = load_spec(model_dir)
    items = without_spare_mtp(saved, tensors.spec, read_hf(model_dir))
    tensors.model.load(items, where=str(model_dir))
    tensors.optimizer.reset_masters()
    return saved


def _load_optimizer(
    directory: Path, tensors: TrainerTensors, known: MegatronTensors, held: ArchSpec, kept: ArchSpec
) -> None:
    """`held`: the model whose moments the files hold, of which those of `kept` go into `known`."""
    optimizer_dir = directory / OPTIMIZER_DIR
    require_optimizer(optimizer_dir)
    for name, of in tensors.optimizer_state().items():
        path = optimizer_dir / f"{name}.safetensors"
        with tensors.optimizer.loading():
            known.load(without_spare_mtp(held, kept, read_tensors(path)), where=str(path), of=_data(of))


def _load_critic(
    directory: Path, critic: TrainerTensors | None, saved: CriticProgress | None
) -> CriticProgress | None:
    if critic is None:
        return None
    if saved is None:
        return CriticProgress()
    _load_model(directory, critic)
    _load_optimizer(directory, critic, critic.trained, critic.spec, critic.spec)
    critic.optimizer.set_updates(saved.updates)
    return saved


def _data(of: OfParameter) -> OfParameter:
    def detached(parameter: nn.Parameter) -> Tensor:
        return of(parameter).detach()

    return detached
