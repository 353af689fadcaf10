"""A draft that comes as a checkpoint of its own: which layout it has, and whether it fits its model.

- MTP: tensors `mtp.*`, alone or inside a whole checkpoint.
- EAGLE (https://arxiv.org/abs/2401.15077): `fc` over embedding and final hidden state, one Llama layer
  without an input norm; the head is the model's.
- EAGLE-3 (https://arxiv.org/abs/2503.01840): `fc` over the inputs of three layers; one `midlayer` that
  attends from embedding and hidden state side by side; a head of its own over a smaller vocabulary. Entry i
  of it is token i + d2t[i] of the model; t2d marks the tokens it has.

Names, and which layers an EAGLE-3 draft reads, are those of published drafts and SGLang's `llama_eagle3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from miles.arch.checkpoint import read_json, tensor_problems, with_mtp
from miles.arch.families import FAMILIES
from miles.arch.families.llama_like import dense_layer_tensors, read_attention
from miles.arch.family import Shape
from miles.arch.hf_config import HfConfig
from miles.arch.safetensors_header import read_headers
from miles.arch.spec import ArchSpec, DenseMlpSpec, LayerSpec
from miles.errors import CheckpointError

Layout = Literal["mtp", "eagle", "eagle3"]

LLAMA_ROPE_THETA = 10000.0
"""What Llama's config means where it does not say."""


@dataclass(frozen=True)
class DraftCheckpoint:
    """A draft that fits its model, as far as config and headers tell.

    Attributes:
        model: EAGLE: the draft seen as a decoder of one layer, in the model's place. MTP: the model with its
            MTP layers.
        prefix: what precedes the names of an EAGLE draft's tensors: `model.`, or nothing.
        taps: EAGLE-3: the layers of the model whose inputs it reads; their count means behind the last one.
        draft_vocab_size: EAGLE-3: entries of its own head.
        fc_bias, own_embedding: tensors that only some EAGLE drafts have.
    """

    directory: Path
    layout: Layout
    model: ArchSpec
    prefix: str = ""
    taps: tuple[int, ...] = ()
    draft_vocab_size: int = 0
    fc_bias: bool = False
    own_embedding: bool = False

    @property
    def layer_name(self) -> str:
        return f"{self.prefix}{'midlayer' if self.layout == 'eagle3' else 'layers.0'}"


def read_draft(directory: Path, target: ArchSpec) -> DraftCheckpoint:
    """Recognise a draft from config.json and headers.

    Raises CheckpointError for what is no draft, what is not supported, and what does not fit the target.
    """
    shapes = {name: tuple(entry.shape) for name, entry in read_headers(directory).items()}
    config = HfConfig(_config(directory), where=str(directory / "config.json"))
    _check_sizes(config, target)
    if any(name.startswith("mtp.") for name in shapes):
        return _mtp(directory, config, shapes, target)
    prefix = "model." if "model.fc.weight" in shapes else ""
    if f"{prefix}fc.weight" not in shapes:
        raise CheckpointError(
            "not a draft",
            where=str(directory),
            why="it has neither fc.weight, as EAGLE and EAGLE-3 drafts have, nor mtp.* tensors",
        )
    draft = _eagle(directory, config, shapes, prefix, target)
    problems = tensor_problems(eagle_tensors(draft), _optional(draft), shapes)
    if problems:
        raise CheckpointError(
            f"the tensors are not those of an {draft.layout.upper()} draft: {problems}",
            where=str(directory),
            fix="use the config.json that was published with these weights",
        )
    return draft


def eagle_tensors(draft: DraftCheckpoint) -> dict[str, Shape]:
    """Published names and shapes of an EAGLE or EAGLE-3 draft."""
    model, prefix, name = draft.model, draft.prefix, draft.layer_name
    width = model.hidden_size
    three = draft.layout == "eagle3"
    tensors: dict[str, Shape] = {f"{prefix}fc.weight": (width, (len(draft.taps) if three else 2) * width)}
    if draft.fc_bias:
        tensors[f"{prefix}fc.bias"] = (width,)
    if draft.own_embedding:
        tensors[f"{prefix}embed_tokens.weight"] = (model.vocab_size, width)
    tensors |= dict(dense_layer_tensors(name, model.layers[0], width))
    if not three:
        del tensors[f"{name}.input_layernorm.weight"]
        return tensors
    for letter in "qkv":
        projection = f"{name}.self_attn.{letter}_proj.weight"
        tensors[projection] = (tensors[projection][0], 2 * width)
    return tensors | {
        f"{name}.hidden_norm.weight": (width,),
        f"{prefix}norm.weight": (width,),
        "lm_head.weight": (draft.draft_vocab_size, width),
        "d2t": (draft.draft_vocab_size,),
        "t2d": (model.vocab_size,),
    }


def _optional(draft: DraftCheckpoint) -> dict[str, Shape]:
    """An EAGLE draft may carry a copy of its model's head."""
    if draft.layout == "eagle3":
        return {}
    return {"lm_head.weight": (draft.model.vocab_size, draft.model.hidden_size)}


def _config(directory: Path) -> Mapping[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            "no such file", where=str(path), fix="point to the directory of a draft, with its config.json"
        )
    return {"rope_theta": LLAMA_ROPE_THETA} | read_json(path)


def _check_sizes(config: HfConfig, target: ArchSpec) -> None:
    """A draft reads its model's hidden states and speaks its tokens."""
    for name in ("hidden_size", "vocab_size"):
        own, wanted = config.count(name), getattr(target, name)
        if name in config.values and own != wanted:
            config.problem(f"{name} is {own}, the model's is {wanted}: the draft was made for another model")
    config.check()


def _mtp(directory: Path, config: HfConfig, shapes: Mapping[str, Shape], target: ArchSpec) -> DraftCheckpoint:
    depth = config.mtp_num_layers()
    config.check()
    if not depth:
        raise CheckpointError(
            "it has mtp.* tensors, but config.json does not say how many layers they are",
            where=str(directory),
            fix="set num_nextn_predict_layers in its config.json",
        )
    model = with_mtp(target, depth)
    own = {name: shape for name, shape in shapes.items() if name.startswith("mtp.")}
    problems = tensor_problems(dict(FAMILIES[target.family].mtp_tensors(model)), {}, own)
    if problems:
        raise CheckpointError(
            f"the mtp.* tensors are not those of a {target.architecture} of this shape: {problems}",
            where=str(directory),
        )
    return DraftCheckpoint(directory, "mtp", model)


def _eagle(
    directory: Path, config: HfConfig, shapes: Mapping[str, Shape], prefix: str, target: ArchSpec
) -> DraftCheckpoint:
    layers = config.count("num_hidden_layers", default=1)
    if layers != 1:
        config.problem(f"num_hidden_layers = {layers} is not supported (only drafts of 1 layer)")
    bias = config.flag("attention_bias", default=False)
    attention = read_attention(config, None, qkv_bias=bias, output_bias=bias, qk_norm=False)
    layer = LayerSpec(attention, DenseMlpSpec(config.count("intermediate_size")))
    model = replace(
        target.policy,
        layers=(layer,),
        rms_norm_eps=config.number("rms_norm_eps", default=1e-6),
    )
    three = any(name.startswith(f"{prefix}midlayer.") for name in shapes)
    draft = DraftCheckpoint(
        directory=directory,
        layout="eagle3" if three else "eagle",
        model=model,
        prefix=prefix,
        taps=_taps(config, target) if three else (),
        draft_vocab_size=config.count("draft_vocab_size", default=target.vocab_size) if three else 0,
        fc_bias=f"{prefix}fc.bias" in shapes,
        own_embedding=f"{prefix}embed_tokens.weight" in shapes,
    )
    config.check()
    return draft


def _taps(config: HfConfig, target: ArchSpec) -> tuple[int, ...]:
    """Layers whose inputs an EAGLE-3 draft reads: an early, a middle and a late one, unless its config says
    behind which layers they are taken.
    """
    named = (config.values.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    count = target.num_layers
    if named is None:
        if count < 6:
            config.problem(
                f"eagle_config.eagle_aux_hidden_state_layer_ids is missing: a model of {count} layers has no "
                "usual choice"
            )
        return (2, count // 2, count - 3)
    if not isinstance(named, list) or not all(type(i) is int and 0 <= i < count for i in named):
        config.problem(f"eagle_aux_hidden_state_layer_ids = {named!r}: the model has layers 0 to {count - 1}")
        return (0, 0, 0)
    return tuple(i + 1 for i in named)
