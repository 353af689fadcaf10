"""The plan of a conversion: every weight with its format before and after, and every file that is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.arch import ArchSpec, published_tensors, with_mtp
from miles.arch.checkpoint import with_mtp_depth
from miles.arch.expert_layout import held_spec
from miles.arch.hf_config import HF_DTYPE_NAMES
from miles.arch.precision import NumberFormat, PrecisionPolicy
from miles.arch.quantization_config import KEYS, quantization_config
from miles.arch.stored_weights import StoredWeight
from miles.errors import CheckpointError
from miles.weights.convert.moves import Move, moment_move, move
from miles.weights.convert.relaid import relaid
from miles.weights.convert.shards import Shard, pack
from miles.weights.convert.source import Source
from miles.weights.convert.wanted import Wanted

_DTYPES = {name: dtype for dtype, name in HF_DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Conversion:
    """What will be written to `target`. Every weight of the source is in `moves`, new ones too."""

    source: Source
    target: Path
    wanted: Wanted
    spec: ArchSpec
    """The model as it will be, as its family publishes it."""
    config: Mapping[str, Any]
    """The config.json that goes with it."""
    moves: tuple[Move, ...]
    shards: tuple[Shard, ...]

    @property
    def bytes_in(self) -> int:
        """Bytes of the source's tensors that are read."""
        return sum(one.weight.nbytes for one in self.moves)

    @property
    def bytes_out(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def num_written(self) -> int:
        """Tensors in the target."""
        return sum(len(one.forms) for one in self.moves)

    @property
    def carries_state(self) -> bool:
        """Whether a run can go on from the target, as it can from the source."""
        return _carries_state(self.wanted) and bool(self.source.state.moments)

    @property
    def left_out(self) -> Mapping[str, str]:
        """Tensors of the source that are not in the target, and why."""
        moments = (
            {} if self.carries_state else dict.fromkeys(self.source.state.moments, "state of the optimizer")
        )
        return {**self.source.stored.left_out, **moments}

    @property
    def fresh(self) -> tuple[str, ...]:
        """Published names of weights that are initialised, those of new MTP layers."""
        return tuple(one.name for one in self.moves if one.how == "new")


def plan_conversion(source: Source, target: Path, wanted: Wanted) -> Conversion:
    """Plan everything, from headers only.

    Raises CheckpointError for a target that exists or does not fit on its disk, weights that the format does
    not take, and MTP layers that add nothing.
    """
    if target.exists():
        raise CheckpointError("already exists", where=str(target), fix="choose another directory")
    spec = _spec(source, wanted)
    policy = wanted.policy(spec)
    layout = _layout(source, spec, policy, wanted)
    held = list(relaid(source.weights, source.spec, layout))
    weights = [*held, *_fresh_weights(held, layout)]
    moves = tuple(move(weight, wanted, policy, spec) for weight in weights)
    _refuse_unfit(moves, target)
    _check_state(source, wanted)
    if _carries_state(wanted):
        moves += tuple(moment_move(moment, wanted) for moment in source.state.moments.values())
    shards = pack(moves, wanted)
    config = _config(source, layout, policy, moves)
    plan = Conversion(source, target, wanted, spec, config, moves, shards)
    _check_space(plan)
    return plan


def _spec(source: Source, wanted: Wanted) -> ArchSpec:
    count, has = wanted.mtp_num_layers, source.spec.mtp_num_layers
    if count is None or (count == has and wanted.format is not None):
        return source.spec
    if count <= has:
        raise CheckpointError(
            f"it has {has} MTP layers already: nothing to add",
            where=str(source.directory),
            fix=f"train with it as it is: --hf-checkpoint {source.directory} --mtp-num-layers {count}",
        )
    if wanted.format is None and any(key in source.config for key in KEYS):
        raise CheckpointError(
            "MTP layers cannot be added to quantised weights as they are",
            where=str(source.directory),
            fix="say in which format all weights are written: --to bf16, --to fp8, …",
        )
    return with_mtp(source.spec, count)


def _layout(source: Source, spec: ArchSpec, policy: PrecisionPolicy | None, wanted: Wanted) -> ArchSpec:
    """The model with its experts as the target stores them: as published where nothing asks otherwise."""
    if policy is None:
        return held_spec(spec, source.weights) if wanted.layout == "hf" else spec
    if lost := policy.lost_exceptions(spec):
        raise CheckpointError(
            f"no tensor of the target has {', '.join(lost)} in its name",
            where="extra_high_precision_layers_hf",
            why="a quantised checkpoint holds the matrices of each expert by themselves",
            fix="keep all experts with experts., or name gate_proj, up_proj and down_proj",
        )
    return policy.layout(spec)


def _fresh_weights(held: Iterable[StoredWeight], spec: ArchSpec) -> Iterator[StoredWeight]:
    """Weights that the source lacks, as if they were stored in the model's own format."""
    known = {weight.name for weight in held}
    for name, shape in published_tensors(spec).items():
        if name not in known:
            yield StoredWeight(name, shape, NumberFormat(spec.dtype), {})


def _carries_state(wanted: Wanted) -> bool:
    return wanted.layout != "hf" and wanted.optimizer


def _check_state(source: Source, wanted: Wanted) -> None:
    if wanted.layout == "native" and not (source.state.moments and source.state.files):
        raise CheckpointError(
            "it has no optimizer's state: a run cannot go on from it",
            where=str(source.directory),
            why="a step of a run's checkpoints has one, and a distributed checkpoint made from such a step",
            fix=f"start a run from its weights: --hf-checkpoint {source.directory}",
        )


def _refuse_unfit(moves: tuple[Move, ...], target: Path) -> None:
    """Weights that the format asked for cannot hold, all at once."""
    problems: dict[str, list[str]] = {}
    for one in moves:
        if one.unfit:
            problems.setdefault(one.unfit, []).append(one.name)
    if problems:
        told = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items())
        raise CheckpointError(
            told,
            where=str(target),
            fix="choose another format or group size, or keep them as they are: "
            "--extra-high-precision-layers-hf NAME",
        )


def _config(
    source: Source, spec: ArchSpec, policy: PrecisionPolicy | None, moves: tuple[Move, ...]
) -> dict[str, Any]:
    """The source's config.json with the formats and MTP layers of the target."""
    config = with_mtp_depth(source.config, spec.mtp_num_layers)
    if policy is None and all(one.how in ("copied", "new") for one in moves):
        return config
    for key in (*KEYS, "dtype"):
        config.pop(key, None)
    other = {name: w.shape for name, w in source.weights.items() if name.startswith(spec.other_parts)}
    shapes = published_tensors(spec) | other
    table = None if policy is None else quantization_config(policy, shapes)
    config |= {"torch_dtype": HF_DTYPE_NAMES[_plain_dtype(moves, spec)]}
    return config | ({"quantization_config": table} if table else {})


def _plain_dtype(moves: tuple[Move, ...], spec: ArchSpec) -> Any:
    """The format of most plain numbers that are written."""
    sizes: dict[str, int] = {}
    shapes = published_tensors(spec)
    for one in moves:
        if one.target is not None and one.target.is_plain and one.name in shapes:
            sizes[one.target.name] = sizes.get(one.target.name, 0) + one.numel
    return max(sizes, key=lambda name: sizes[name]) if sizes else spec.dtype


def _check_space(plan: Conversion) -> None:
    parent = next(p for p in plan.target.absolute().parents if p.exists())
    # What an earlier start wrote is written over or thrown away.
    held = sum(path.stat().st_blocks * 512 for path in partial_directory(plan.target).rglob("*"))
    free = shutil.disk_usage(parent).free + held
    if free < plan.bytes_out:
        raise CheckpointError(
            f"the weights take {plan.bytes_out:,} bytes, the disk has {free:,} left",
            where=str(plan.target),
            fix="free space, or choose another disk",
        )


def partial_directory(target: Path) -> Path:
    """Where the work on a target lies until it is complete."""
    return target.with_name(f".{target.name}.partial")


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
