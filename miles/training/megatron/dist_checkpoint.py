"""A Megatron trainer on disk in Megatron's own form: every rank writes what it holds, none gathers anything.

torch_dist/            by megatron-core: model, moments, fp32 masters; config.json and tokenizer
trainer_state.json     as in the other form (`checkpoint`)

Moments are cut like their parameters and stored under `optimizer.state.<moment>.<Megatron's name>`, so they
are read back in any layout: over TP, PP and EP. All ranks need the directory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from miles.arch import ArchSpec
from miles.errors import CheckpointError
from miles.training.megatron.background_save import BackgroundSave
from miles.training.megatron.checkpoint import TrainerTensors
from miles.training.megatron.tensors import OfParameter
from miles.training.megatron.torch_dist import VERSION, dist_checkpointing, write_description
from miles.training.native.checkpoint import MASTER, STATE_FILE, read_state
from miles.training.native.state import TrainerState

DIST_DIR = "torch_dist"
PREFIX = "optimizer.state"
KEYS = {MASTER: "fp32_param"}
"""Megatron's word for one of ours."""


def save_dist_checkpoint(
    directory: Path,
    tensors: TrainerTensors,
    policy: Sequence[nn.Module],
    draft: nn.Module | None,
    state: TrainerState,
    source_dir: Path | None,
    background: BackgroundSave | None = None,
) -> None:
    """Write into an existing directory. `policy`: this rank's chunks, `draft`: its MTP layers, if any.

    With `background`, begin to: all is there once it has finished.
    """
    target = directory / DIST_DIR
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    trained = [*policy, *([draft] if draft is not None and tensors.draft is not None else [])]
    everything = _state(tensors, [*policy, *([draft] if draft is not None else [])], trained)
    form = "torch_dist", VERSION
    request = dist_checkpointing().save(
        everything, str(target), form, async_sharded_save=background is not None
    )
    if background is not None:
        background.start(request)
    if dist.get_rank() == 0:
        write_description(target, tensors.spec, tensors.optimizer.dtype, source_dir)
        (directory / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def load_dist_checkpoint(
    directory: Path, tensors: TrainerTensors, policy: Sequence[nn.Module], draft: nn.Module | None
) -> TrainerState:
    """Fill model and optimizer from what `save_dist_checkpoint` wrote in any layout and return the state; MTP
    layers as in `checkpoint.load_checkpoint`. Raises CheckpointError.
    """
    state = replace(read_state(directory / STATE_FILE), critic=None)
    trains = tensors.draft is not None
    with_draft = trains and state.draft_updates is not None
    modules = [*policy, *([draft] if draft is not None else [])]
    trained = [*policy, *([draft] if draft is not None and with_draft else [])]
    found = _load(directory / DIST_DIR, _state(tensors, modules, trained), tensors.spec)
    for index, module in enumerate(modules):
        module.load_state_dict(found[f"model{index}"], strict=False)
    # Masters that were read lie where they belong by now: taken from the weights, they would be rounded.
    with_masters = MASTER in tensors.optimizer_state()
    if not with_masters:
        tensors.optimizer.reset_masters()
    if tensors.draft is not None and not (with_masters and with_draft):
        tensors.draft.reset_masters()
    with torch.no_grad(), tensors.optimizer.loading():
        for index, module in enumerate(trained):
            for name, of in tensors.optimizer_state().items():
                for key, parameter in module.named_parameters():
                    of(parameter).detach().copy_(found[f"{name}{index}"][key])
    tensors.optimizer.set_updates(state.updates)
    if tensors.draft is not None:
        tensors.draft.set_updates(state.draft_updates or 0)
    return replace(state, draft_updates=state.draft_updates or 0 if trains else None)


def _state(
    tensors: TrainerTensors, modules: Sequence[nn.Module], trained: Sequence[nn.Module]
) -> dict[str, Any]:
    """Of every module its weights, and of the trained ones, which come first in the same order, their
    moments, as megatron-core writes and reads them.
    """
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    state: dict[str, Any] = {}
    for index, module in enumerate(modules):
        sharded = state[f"model{index}"] = module.sharded_state_dict(prefix="")
        for name, of in tensors.optimizer_state().items() if module in trained else ():
            prefix = f"{PREFIX}.{KEYS.get(name, name)}"
            state[f"{name}{index}"] = {
                key: make_sharded_optimizer_tensor(sharded[key], _whole(tensors, parameter, of), prefix)
                for key, parameter in module.named_parameters()
            }
    return state


def _whole(tensors: TrainerTensors, parameter: nn.Parameter, of: OfParameter) -> torch.Tensor:
    """A parameter's state; of a distributed optimizer it is put together from all data-parallel ranks, which
    ask for the same parameters in the same order.
    """
    value = of(parameter).detach()
    if not tensors.optimizer.shares(parameter):
        return value
    dense = getattr(parameter, "allreduce", True)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    group = group if dense else parallel_state.get_expert_data_parallel_group()
    # Added to zeros as whole numbers, no bit changes.
    dist.all_reduce(value.view(torch.int32), group=group)
    return value


def _load(directory: Path, state: dict[str, Any], spec: ArchSpec) -> dict[str, Any]:
    module = dist_checkpointing()
    try:
        found: dict[str, Any] = module.load(state, str(directory))
    except (module.core.CheckpointingException, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be read as {spec.architecture}: {error}", where=str(directory)
        ) from error
    return found
