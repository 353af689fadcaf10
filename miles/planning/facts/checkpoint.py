"""What a checkpoint directory holds, read from its config and the headers of its weight files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from miles.arch import ArchSpec, check_shapes, load_spec, published_tensors, spec_from_hf_config
from miles.arch.checkpoint import read_json
from miles.arch.expert_layout import held_spec
from miles.arch.quantization_config import read_quantization_config
from miles.arch.safetensors_header import TensorEntry, read_headers
from miles.arch.stored_weights import stored_weights
from miles.data.tasks import PREFIX, is_builtin, parse_builtin
from miles.errors import CheckpointError, DataError
from miles.planning.facts.quantisation import Quantisation, read_quantisation
from miles.planning.facts.turn_end import unknown_turn_end

if TYPE_CHECKING:
    from miles.data.tokenizer import CheckpointTokenizer

State = Literal["unset", "missing", "directory", "builtin"]


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint as preflight sees it; each `…_problem` is an error met on the way, in one line.

    A built-in model has no weight files: a warm start makes its weights when the run starts.
    """

    name: str
    state: State
    problem: str = ""
    spec: ArchSpec | None = None
    spec_problem: str = ""
    weights_problem: str = ""
    shapes_problem: str = ""
    weight_bytes: int = 0
    has_mtp_weights: bool = False
    tokenizer_problem: str = ""
    tokenizer_size: int | None = None
    has_chat_template: bool = False
    quantisation: Quantisation | None = None
    """How the weights are quantised; None for plain numbers."""
    turn_end: tuple[int, str] | None = None
    """Id and text of the token that ends a turn in the chat template, where the model does not stop at it."""


def read_checkpoint(name: str | None) -> tuple[CheckpointFacts, CheckpointTokenizer | None]:
    """Facts of `hf_checkpoint` (a directory, a built-in name, or nothing) and its tokenizer, if any."""
    if name is None:
        return CheckpointFacts("", "unset"), None
    if is_builtin(name):
        return _builtin(name), None
    directory = Path(name)
    if not directory.is_dir():
        return CheckpointFacts(name, "missing", problem="is not a directory"), None
    spec, spec_problem = _spec(directory)
    entries, weights_problem = _headers(directory)
    tokenizer, tokenizer_problem = _tokenizer(directory)
    config = {} if spec is None else read_json(directory / "config.json")
    quantisation = read_quantisation(config, entries)
    facts = CheckpointFacts(
        name=name,
        state="directory",
        spec=spec,
        spec_problem=spec_problem,
        weights_problem=weights_problem,
        shapes_problem=_shapes_problem(spec, config, entries, name),
        weight_bytes=sum(entry.nbytes for entry in entries.values()),
        has_mtp_weights=spec is not None and any(_is_mtp(tensor, spec.num_layers) for tensor in entries),
        tokenizer_problem=tokenizer_problem,
        tokenizer_size=tokenizer.vocab_size if tokenizer else None,
        has_chat_template=tokenizer is not None and bool(tokenizer.chat_templates),
        quantisation=quantisation,
        turn_end=unknown_turn_end(tokenizer, spec) if tokenizer and spec else None,
    )
    return facts, tokenizer


def read_load_quantisation(name: str | None) -> Quantisation | None:
    """How the weights of `load` are quantised, by its config.json; None for plain numbers and for no file."""
    config = Path(name) / "config.json" if name is not None else None
    return read_quantisation(read_json(config), {}) if config is not None and config.is_file() else None


def _builtin(name: str) -> CheckpointFacts:
    """Facts of a built-in model from its recipe; nothing is written."""
    from miles.data.tasks import sort

    try:
        builtin = parse_builtin(name)
    except DataError as error:
        return CheckpointFacts(name, "missing", problem=error.what)
    if builtin.task != "sort" or builtin.part:
        return CheckpointFacts(name, "missing", problem=f"is not built in; there is {PREFIX}sort")
    return CheckpointFacts(
        name=name,
        state="builtin",
        spec=spec_from_hf_config(sort.model_config(), where=name),
        tokenizer_size=len(sort.VOCABULARY),
    )


def _spec(directory: Path) -> tuple[ArchSpec | None, str]:
    try:
        return load_spec(directory), ""
    except CheckpointError as error:
        return None, error.in_one_line


def _headers(directory: Path) -> tuple[Mapping[str, TensorEntry], str]:
    try:
        return read_headers(directory), ""
    except CheckpointError as error:
        return {}, error.in_one_line


def _shapes_problem(
    spec: ArchSpec | None, config: Mapping[str, Any], entries: Mapping[str, TensorEntry], where: str
) -> str:
    """How the weights, quantised or not, differ from those of config.json."""
    if spec is None or not entries or not _layout_is_known(config):
        return ""
    try:
        layout = held_spec(spec, entries)
        held = stored_weights(entries, config, published_tensors(layout), where).weights
        check_shapes(layout, {name: weight.shape for name, weight in held.items()}, where=where)
    except CheckpointError as error:
        return error.what
    return ""


def _layout_is_known(config: Mapping[str, Any]) -> bool:
    """An engine may well read quantised weights that we do not."""
    try:
        read_quantization_config(config, "")
    except CheckpointError:
        return False
    return True


def _tokenizer(directory: Path) -> tuple[CheckpointTokenizer | None, str]:
    from miles.data.tokenizer import CheckpointTokenizer

    try:
        return CheckpointTokenizer(directory), ""
    except CheckpointError as error:
        return None, error.in_one_line


def _is_mtp(tensor: str, num_layers: int) -> bool:
    """MTP layers are published as `mtp.*`, or as decoder layers after the last one."""
    layer = re.match(r"model\.layers\.(\d+)\.", tensor)
    return tensor.startswith(("mtp.", "model.mtp.")) or (layer is not None and int(layer[1]) >= num_layers)
