"""A Megatron trainer on disk in Megatron's own form: every rank writes what it holds, none gathers anything.

torch_dist/            by megatron-core: model, moments, fp32 masters; config.json and tokenizer
trainer_state.json     as in the other form (`checkpoint`)

Moments are cut like their parameters and stored under `optimizer.state.<moment>.<Megatron's name>`, so they
are read back in any layout: over TP, PP and EP. A critic's names begin with `critic.`. All ranks need the
directory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from miles.training.native.state import CriticProgress, TrainerState

DIST_DIR = "torch_dist"
PREFIX = "optimizer.state"
CRITIC = "critic."
KEYS = {MASTER: "fp32_param"}
"""Megatron's word for one of ours."""


@dataclass(frozen=True)
class Parts:
    """One model of a trainer as its modules: this rank's chunks and MTP layers, if any; and its critic."""

    tensors: TrainerTensors
    chunks: Sequence[nn.Module]
    draft: nn.Module | None = None
    critic: Parts | None = None

    def modules(self, with_draft: bool = True) -> list[nn.Module]:
        """Chunks, and behind them the MTP layers."""
        return [*self.chunks, *([self.draft] if self.draft is not None and with_draft else [])]


def save_dist_checkpoint(
    directory: Path,
    parts: Parts,
    state: TrainerState,
    source_dir: Path | None,
    background: BackgroundSave | None = None,
) -> None:
    """Write into an existing directory. With `background`, begin to: all is there once it has finished."""
    target, tensors = directory / DIST_DIR, parts.tensors
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    everything = _state(tensors, parts.modules(), parts.modules(tensors.draft is not None))
    if parts.critic is not None:
        everything |= _critic_state(parts.critic)
    form = "torch_dist", VERSION
    request = dist_checkpointing().save(
        everything, str(target), form, async_sharded_save=background is not None
    )
    if background is not None:
        background.start(request)
    if dist.get_rank() == 0:
        write_description(target, tensors.spec, tensors.optimizer.dtype, source_dir)
        (directory / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def load_dist_checkpoint(directory: Path, parts: Parts) -> TrainerState:
    """Fill model and optimizer from what `save_dist_checkpoint` wrote in any layout and return the state; MTP
    layers and a critic as in `checkpoint.load_checkpoint`. Raises CheckpointError.
    """
    state, tensors = read_state(directory / STATE_FILE), parts.tensors
    trains = tensors.draft is not None
    modules = parts.modules()
    trained = parts.modules(trains and state.draft_updates is not None)
    wanted = _state(tensors, modules, trained)
    critic = parts.critic if state.critic is not None else None
    if critic is not None:
        wanted |= _critic_state(critic)
    found = _load(directory / DIST_DIR, wanted, tensors.spec)
    _fill(tensors, modules, trained, found)
    tensors.optimizer.set_updates(state.updates)
    if tensors.draft is not None:
        tensors.draft.set_updates(state.draft_updates or 0)
    if critic is not None and state.critic is not None:
        _fill(critic.tensors, critic.modules(), critic.modules(), found, CRITIC)
        critic.tensors.optimizer.set_updates(state.critic.updates)
    fresh = None if parts.critic is None else CriticProgress()
    return replace(
        state,
        draft_updates=state.draft_updates or 0 if trains else None,
        critic=fresh if critic is None else state.critic,
    )


def _fill(
    tensors: TrainerTensors,
    modules: Sequence[nn.Module],
    trained: Sequence[nn.Module],
    found: dict[str, Any],
    prefix: str = "",
) -> None:
    """Models, masters and moments from what `_state` asked for."""
    for index, module in enumerate(modules):
        module.load_state_dict(found[f"{prefix}model{index}"], strict=False)
    # Masters that were read lie where they belong by now: taken from the weights, they would be rounded.
    with_masters = MASTER in tensors.optimizer_state()
    if not with_masters:
        tensors.optimizer.reset_masters()
    if tensors.draft is not None and not (with_masters and len(trained) == len(modules)):
        tensors.draft.reset_masters()
    with torch.no_grad(), tensors.optimizer.loading():
        for index, module in enumerate(trained):
            for name, of in tensors.optimizer_state().items():
                for key, parameter in module.named_parameters():
                    of(parameter).detach().copy_(found[f"{prefix}{name}{index}"][key])


def _critic_state(critic: Parts) -> dict[str, Any]:
    return _state(critic.tensors, critic.modules(), critic.modules(), CRITIC)


def _state(
    tensors: TrainerTensors, modules: Sequence[nn.Module], trained: Sequence[nn.Module], prefix: str = ""
) -> dict[str, Any]:
    """Of every module its weights, and of the trained ones, which come first in the same order, their
    moments, as megatron-core writes and reads them. `prefix`: before the names of weights.
    """
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    state: dict[str, Any] = {}
    for index, module in enumerate(modules):
        sharded = state[f"{prefix}model{index}"] = module.sharded_state_dict(prefix="")
        add_prefix_for_sharding(sharded, prefix)
        for name, of in tensors.optimizer_state().items() if module in trained else ():
            theirs = f"{PREFIX}.{KEYS.get(name, name)}"
            state[f"{prefix}{name}{index}"] = {
                key: make_sharded_optimizer_tensor(sharded[key], _whole(tensors, parameter, of), theirs)
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
