"""Megatron's distributed checkpoints (`torch_dist`): weights under Megatron's own names, in any layout.

Written and read by megatron-core itself. Beside its files lie config.json and the tokenizer, so that the
checkpoint says what it is.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles.arch import ArchSpec, load_spec, to_hf_config, with_mtp_depth
from miles.arch.checkpoint import read_json
from miles.arch.hf_config import HF_DTYPE_NAMES
from miles.arch.quantization_config import KEYS
from miles.errors import CheckpointError
from miles.training.megatron import cpu
from miles.training.megatron.groups import open_groups
from miles.training.megatron.layout import MegatronLayout, require_expressible
from miles.training.megatron.results_queue import results_queue
from miles.training.settings import TrainerSettings
from miles.weights.atomic import staged_directory
from miles.weights.hf import TORCH_DTYPES, copy_companions, read_hf, write_hf

if TYPE_CHECKING:
    from miles.training.megatron.tensors import MegatronTensors

VERSION = 1
"""Of the torch_dist format, as megatron-core counts it."""


def hf_to_torch_dist(source: Path, target: Path) -> int:
    """Write the weights of a Hugging Face checkpoint as `torch_dist`, bit for bit; the number of tensors.

    Raises CheckpointError when the target exists or the source is damaged, MilesError for a model that the
    Megatron trainer does not carry.
    """
    spec = load_spec(source)
    with staged_directory(target) as stage:
        count = _write(stage, spec, read_hf(source), TORCH_DTYPES[spec.dtype])
        write_description(stage, spec, TORCH_DTYPES[spec.dtype], source)
    return count


def write_description(directory: Path, spec: ArchSpec, dtype: torch.dtype, source_dir: Path | None) -> None:
    """config.json and the tokenizer, beside weights in `dtype`."""
    stored = next(name for name, form in TORCH_DTYPES.items() if form == dtype)
    config = to_hf_config(spec)
    if source_dir is not None:
        config |= read_json(source_dir / "config.json")
        # The weights are plain, whatever those of the source are.
        config = {key: value for key, value in config.items() if key not in KEYS}
        copy_companions(source_dir, directory)
    config = with_mtp_depth(config, spec.mtp_num_layers) | {"torch_dtype": HF_DTYPE_NAMES[stored]}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def torch_dist_to_hf(source: Path, target: Path, config_dir: Path | None = None) -> int:
    """Write the weights of a `torch_dist` checkpoint as a Hugging Face checkpoint, bit for bit.

    Args:
        config_dir: the checkpoint that has config.json and the tokenizer, if not `source`, and the weights of
            other parts than the language model, which Megatron does not hold.
    """
    source = _newest(source)
    described = config_dir or source
    spec = load_spec(described)
    if spec.other_parts and config_dir is None:
        raise CheckpointError(
            f"only the language model of {spec.architecture} is in it, not {', '.join(spec.other_parts)}",
            where=str(source),
            fix="name the checkpoint that it was made from: --origin-hf-dir",
        )
    tensors = dict(_read(source, spec, TORCH_DTYPES[spec.dtype]))
    write_hf(target, spec, tensors.items(), described, spec.dtype)
    return len(tensors)


def _newest(directory: Path) -> Path:
    """The checkpoint itself, where a directory of Megatron's holds one for each of several iterations."""
    pointer = directory / "latest_checkpointed_iteration.txt"
    if not pointer.is_file():
        return directory
    name = pointer.read_text(encoding="utf-8").strip()
    return directory / (f"iter_{int(name):07d}" if name.isdigit() else name)


def _model(spec: ArchSpec, dtype: torch.dtype) -> tuple[list[Any], MegatronTensors]:
    """The modules that hold all of the model, without a trainer around them, and its tensors by name."""
    require_expressible(spec)
    layout, device = MegatronLayout(), torch.device("cpu")
    open_groups(layout, spec.num_layers)
    from miles.training.megatron.chunks import built, built_draft
    from miles.training.megatron.tensors import MegatronTensors

    chunks = built(spec.policy, layout, TrainerSettings(), dtype, device)
    draft = built_draft(spec, layout, TrainerSettings(), dtype, device)
    modules = [*chunks.bare, *([] if draft is None else [draft])]
    return modules, MegatronTensors(spec, chunks.bare, device, draft)


def _sharded(modules: list[Any]) -> dict[str, Any]:
    """Their tensors as megatron-core writes and reads them."""
    state: dict[str, Any] = {}
    for module in modules:
        state |= module.sharded_state_dict(prefix="")
    return state


def dist_checkpointing() -> Any:
    """megatron-core's module, whose parts are imported late and must find a machine without CUDA too."""
    module = importlib.import_module("megatron.core.dist_checkpointing")
    parts = "megatron.core.dist_checkpointing.strategies"
    for part in ("torch", "async_utils", "common"):
        importlib.import_module(f"{parts}.{part}")
    writer: Any = importlib.import_module(f"{parts}.filesystem_async")
    writer._get_write_results_queue = results_queue
    cpu.install()
    return module


def _write(directory: Path, spec: ArchSpec, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> int:
    modules, named = _model(spec, dtype)
    named.load(tensors, where="the source")
    checkpointing = dist_checkpointing()
    checkpointing.save(_sharded(modules), str(directory), ("torch_dist", VERSION))
    return len(named.names)


def _read(directory: Path, spec: ArchSpec, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    modules, named = _model(spec, dtype)
    checkpointing = dist_checkpointing()
    try:
        state = checkpointing.load(_sharded(modules), str(directory))
    except (checkpointing.core.CheckpointingException, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be read as {spec.architecture}: {error}",
            where=str(directory),
            fix="name the checkpoint that has its config.json: --origin-hf-dir",
        ) from error
    weights = {name: value for name, value in state.items() if torch.is_tensor(value)}
    for module in modules:
        module.load_state_dict(weights, strict=False)
    yield from named.published(dtype)
