"""A Megatron trainer on disk, in the native trainer's form: everything under published names.

model/                  an HF checkpoint in the trained dtype
optimizer/              exp_avg.safetensors, exp_avg_sq.safetensors; master.safetensors unless fp32 is trained
trainer_state.json      step, updates, knobs in effect and as configured

The files do not depend on the layout that wrote them, nor on the trainer: a run goes on from them on any.
"""

from __future__ import annotations

import json
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from miles.arch import ArchSpec, load_spec
from miles.errors import CheckpointError
from miles.training.megatron.optimizer import MOMENTS, MasterAdam
from miles.training.megatron.tensors import MegatronTensors, OfParameter
from miles.training.native.checkpoint import MASTER, MODEL_DIR, OPTIMIZER_DIR, STATE_FILE, read_state
from miles.training.native.state import TrainerState
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
) -> None:
    """Write into an existing directory. The first rank writes, the others give their shards; when writing
    fails, it is the first that raises.
    """
    dtype = tensors.optimizer.dtype
    weights = tensors.model.published(dtype)
    streams = {
        name: tensors.trained.published(torch.float32, of, shared=tensors.optimizer.shares)
        for name, of in (tensors.optimizer_state() if with_optimizer else {}).items()
    }
    with ExitStack() as stack:
        # Whatever happens to this rank's disk, the others' gathers are answered: they would wait forever.
        for stream in reversed([weights, *streams.values()]):
            stack.callback(deque, stream, maxlen=0)
        if dist.get_rank() != 0:
            return
        stored = next(name for name, form in TORCH_DTYPES.items() if form == dtype)
        write_hf(directory / MODEL_DIR, tensors.spec, weights, source_dir, stored)
        if with_optimizer:
            (directory / OPTIMIZER_DIR).mkdir()
        forms = {name: (shape, torch.float32) for name, shape in tensors.trained.shapes.items()}
        for name, stream in streams.items():
            stream_tensors(directory / OPTIMIZER_DIR / f"{name}.safetensors", forms, stream)
        (directory / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def load_checkpoint(directory: Path, tensors: TrainerTensors, policy: MegatronTensors) -> TrainerState:
    """Fill model and optimizer from what any trainer's `save` wrote and return the state. Every rank reads
    its own part of the files.

    MTP layers that were not trained before start with fresh moments; moments of those that are no longer
    trained, and MTP layers that this run does without, are left out. `policy`: the model without them.

    Raises CheckpointError for a missing or damaged part.
    """
    state = replace(read_state(directory / STATE_FILE), critic=None)
    model_dir, optimizer_dir = directory / MODEL_DIR, directory / OPTIMIZER_DIR
    saved, spec = load_spec(model_dir), tensors.spec
    tensors.model.load(without_spare_mtp(saved, spec, read_hf(model_dir)), where=str(model_dir))
    tensors.optimizer.reset_masters()
    if tensors.draft is not None:
        tensors.draft.reset_masters()
    if not optimizer_dir.is_dir():
        raise CheckpointError(
            "the checkpoint holds no optimizer state",
            where=str(optimizer_dir),
            why="it was saved with checkpoint.no_save_optim",
            fix="start a new run from its model directory instead of resuming",
        )
    had_draft, trains_draft = state.draft_updates is not None, tensors.trained_spec.mtp is not None
    known = tensors.trained if had_draft else policy
    kept = tensors.trained_spec if had_draft else spec.policy
    held = saved if had_draft else saved.policy
    for name, of in tensors.optimizer_state().items():
        path = optimizer_dir / f"{name}.safetensors"
        with tensors.optimizer.loading():
            known.load(without_spare_mtp(held, kept, read_tensors(path)), where=str(path), of=_data(of))
    tensors.optimizer.set_updates(state.updates)
    if tensors.draft is not None:
        tensors.draft.set_updates(state.draft_updates or 0)
    return replace(state, draft_updates=state.draft_updates or 0 if trains_draft else None)


def _data(of: OfParameter) -> OfParameter:
    def detached(parameter: nn.Parameter) -> Tensor:
        return of(parameter).detach()

    return detached
