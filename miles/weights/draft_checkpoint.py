"""Loading a draft from a checkpoint of its own.

>>> draft = load_draft(read_draft(directory, decoder.spec), torch.float32)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from miles.arch.draft_checkpoint import DraftCheckpoint
from miles.errors import CheckpointError
from miles.models.eagle import DraftModel, Eagle3Draft, EagleDraft
from miles.models.mtp import MtpDraft
from miles.weights.hf import read_hf
from miles.weights.native_map import dense_layer_views, mtp_to_published


@torch.no_grad()
def load_draft(draft: DraftCheckpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> DraftModel:
    """The draft with its weights, without gradients. Raises CheckpointError for a broken vocabulary."""
    tensors = read_hf(draft.directory)
    if draft.layout == "mtp":
        mtp = MtpDraft(draft.model, dtype)
        _fill(dict(mtp_to_published(mtp)), tensors)
        return mtp.requires_grad_(False).to(device)
    if draft.layout == "eagle":
        eagle = EagleDraft(draft, dtype)
        _fill(dict(_eagle_views(draft, eagle)), tensors)
        return eagle.requires_grad_(False).to(device)
    return _eagle3(draft, dtype, tensors).requires_grad_(False).to(device)


def _eagle3(draft: DraftCheckpoint, dtype: torch.dtype, tensors: Iterator[tuple[str, Tensor]]) -> Eagle3Draft:
    model = Eagle3Draft(draft, dtype)
    vocab_size, own = draft.model.vocab_size, draft.draft_vocab_size
    offsets, known = torch.zeros(own, dtype=torch.int64), torch.zeros(vocab_size, dtype=torch.bool)
    _fill({**dict(_eagle_views(draft, model)), "d2t": offsets, "t2d": known}, tensors)
    ids = torch.arange(own) + offsets
    said = torch.zeros(vocab_size, dtype=torch.bool)
    inside = bool(((ids >= 0) & (ids < vocab_size)).all())
    if inside:
        said[ids] = True
    if not inside or int(said.sum()) != own or not torch.equal(said, known):
        raise CheckpointError(
            "d2t and t2d do not describe one vocabulary",
            where=str(draft.directory),
            why=f"i + d2t[i] must be {own} different tokens below {vocab_size}, those that t2d marks",
        )
    model.token_ids.copy_(ids)
    return model


def _fill(views: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Copy what the draft has a place for; shapes and completeness are known from the headers."""
    for name, tensor in tensors:
        if name in views:
            views[name].copy_(tensor)


def _eagle_views(draft: DraftCheckpoint, model: EagleDraft | Eagle3Draft) -> Iterator[tuple[str, Tensor]]:
    """Published names and the views they fill."""
    native = {name: parameter.detach() for name, parameter in model.named_parameters()}
    prefix, layer = draft.prefix, draft.layer_name
    outside = {
        "fc": f"{prefix}fc.weight",
        "fc_bias": f"{prefix}fc.bias",
        "embed": f"{prefix}embed_tokens.weight",
        "post_norm": f"{layer}.post_attention_layernorm.weight",
        "input_norm": f"{layer}.input_layernorm.weight",
        "hidden_norm": f"{layer}.hidden_norm.weight",
        "final_norm": f"{prefix}norm.weight",
        "head": "lm_head.weight",
    }
    yield from ((name, native[ours]) for ours, name in outside.items() if ours in native)
    yield from dense_layer_views(draft.model.layers[0], native, layer)
