"""From a checkpoint directory to an ArchSpec, and whether its weights are the ones its config promises.

>>> spec = load_spec("Qwen3-0.6B"); check_weights(spec, "Qwen3-0.6B")
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles.arch.families import FAMILIES
from miles.arch.family import Family, Shape
from miles.arch.hf_config import MTP_KEYS, HfConfig
from miles.arch.safetensors_header import TensorEntry, read_headers
from miles.arch.spec import ArchSpec, MtpSpec
from miles.errors import CheckpointError

_LISTED = 5
"""Names shown per kind of mismatch before the rest is counted."""


def load_spec(checkpoint_dir: str | Path) -> ArchSpec:
    """Read `config.json` (and the stop tokens of `generation_config.json`) of a Hugging Face checkpoint.

    Raises `CheckpointError` when the file is missing or not JSON, the family is unknown, or keys are missing
    or inconsistent; all problems are named at once.
    """
    directory = Path(checkpoint_dir)
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            "no such file", where=str(path), fix="point to the directory of a Hugging Face checkpoint"
        )
    spec = spec_from_hf_config(read_json(path), where=str(path))
    generation_path = directory / "generation_config.json"
    if not generation_path.is_file():
        return spec
    generation = HfConfig(read_json(generation_path), where=str(generation_path))
    stops = generation.token_ids("eos_token_id")
    generation.check()
    return dataclasses.replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + stops)))


def spec_from_hf_config(values: Mapping[str, Any], where: str = "config.json") -> ArchSpec:
    """ArchSpec of a parsed config.json; `where` names it in errors."""
    return _family_of(values, where).from_hf_config(HfConfig(values, where))


def to_hf_config(spec: ArchSpec) -> dict[str, Any]:
    """The config.json of a model, in the form its family's published checkpoints use."""
    return with_mtp_depth(FAMILIES[spec.family].to_hf_config(spec), spec.mtp_num_layers)


def with_mtp_depth(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """A config.json that counts so many MTP layers."""
    rest = {key: value for key, value in config.items() if key not in MTP_KEYS}
    return rest | ({MTP_KEYS[0]: num_layers} if num_layers else {})


def published_tensors(spec: ArchSpec) -> dict[str, Shape]:
    """Name and shape of every tensor in the model's published checkpoint, MTP layers included."""
    family = FAMILIES[spec.family]
    return dict(family.published_tensors(spec)) | dict(family.mtp_tensors(spec))


def optional_copies(spec: ArchSpec) -> dict[str, str]:
    """Tensors that some published checkpoints hold a second time, with the name of the one they repeat: the
    head of a tied model, embedding and head beside MTP layers.
    """
    tied = {spec.head_name: spec.embedding_name} if spec.tie_word_embeddings else {}
    return tied | dict(FAMILIES[spec.family].mtp_copies(spec))


def with_mtp(spec: ArchSpec, num_layers: int) -> ArchSpec:
    """The model with so many MTP layers: the first it has, and further ones shaped like its last layer."""
    if num_layers == 0:
        return spec.policy
    if not FAMILIES[spec.family].takes_mtp:
        raise CheckpointError(
            f"{spec.family} has no MTP layers",
            where="mtp_num_layers",
            why="no checkpoint of this family has any, so there are no names and no form for them",
            fix="leave --mtp-num-layers out, or draft with --sglang-speculative-algorithm NGRAM",
        )
    own = spec.mtp.layers if spec.mtp else ()
    layers = (own + (spec.layers[-1],) * num_layers)[:num_layers]
    return dataclasses.replace(spec, mtp=MtpSpec(layers, FAMILIES[spec.family].shared_mtp_projection))


def check_weights(spec: ArchSpec, checkpoint_dir: str | Path) -> dict[str, TensorEntry]:
    """Compare config.json with the weights' headers; return the headers by published name.

    Raises `CheckpointError` naming missing, unexpected and wrongly shaped tensors, missing shards and
    damaged files.
    """
    entries = read_headers(Path(checkpoint_dir))
    check_shapes(spec, {name: entry.shape for name, entry in entries.items()}, where=str(checkpoint_dir))
    return entries


def check_shapes(spec: ArchSpec, found: Mapping[str, Shape], where: str) -> None:
    """Refuse a set of tensors that is not exactly the published one; names are in the error.

    `optional_copies` may be there or not; tensors of other parts (`spec.other_parts`) may be any.
    """
    found = {name: shape for name, shape in found.items() if not name.startswith(spec.other_parts)}
    table = (spec.vocab_size, spec.hidden_size)
    problems = tensor_problems(published_tensors(spec), dict.fromkeys(optional_copies(spec), table), found)
    if problems:
        raise CheckpointError(
            f"weights do not match config.json: {problems}",
            where=where,
            fix="use the config.json that was published with these weights",
        )


def tensor_problems(
    expected: Mapping[str, Shape], optional: Mapping[str, Shape], found: Mapping[str, Shape]
) -> str:
    """What is missing, unexpected and wrongly shaped among tensors; empty when all is well."""
    shapes = {**expected, **optional}
    problems = [
        _listed("missing", [name for name in expected if name not in found]),
        _listed("unexpected", [name for name in found if name not in shapes]),
        _listed(
            "wrong shape",
            [
                f"{name} is {list(found[name])}, config.json gives {list(shape)}"
                for name, shape in shapes.items()
                if name in found and tuple(found[name]) != shape
            ],
        ),
    ]
    return "; ".join(p for p in problems if p)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `CheckpointError` when it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fix = "copy the file again from where the checkpoint came from"
        raise CheckpointError(f"not JSON: {error}", where=str(path), fix=fix) from error
    if not isinstance(values, dict):
        raise CheckpointError("not a JSON object", where=str(path), fix="name the file of a checkpoint")
    return values


def _family_of(values: Mapping[str, Any], where: str) -> Family:
    architectures = values.get("architectures") or []
    for family in FAMILIES.values():
        if any(name in family.architectures for name in architectures):
            return family
    model_type = values.get("model_type")
    if not architectures and model_type in FAMILIES:
        return FAMILIES[model_type]
    named = ", ".join(map(str, architectures)) or f"model_type {model_type!r}"
    supported = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise CheckpointError(f"unsupported architecture: {named}", where=where, why=f"supported: {supported}")


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{what} ({len(names)}): {shown}{more}"
