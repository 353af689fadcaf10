"""Weights for `/update_weights_from_tensor`: buckets of published tensors, by value.

A payload is base64 of a pickled list of (name, CPU tensor). SGLang unpickles it with an allow-list that knows
torch's own tensors, so no class of SGLang is needed here.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator

import torch

Bucket = list[tuple[str, torch.Tensor]]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def with_tied_head(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a tied model with the head that it shares with its embedding, as a tensor of its own.

    SGLang's MoE models keep a separate head even where `tie_word_embeddings` is set, and serve it untouched
    (every token equally likely) when no checkpoint names it; its dense models leave the second copy aside.
    """
    for name, tensor in weights:
        if name != HEAD:
            yield name, tensor
        if name == EMBEDDING:
            yield HEAD, tensor


def buckets(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[tuple[Bucket, bool]]:
    """Group tensors, in their order, into buckets of at most `max_bytes` (one larger tensor has its own).

    Gives (bucket, whether it is the last one).
    """
    bucket: Bucket = []
    held = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if bucket and held + size > max_bytes:
            yield bucket, False
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += size
    yield bucket, True


def encode(bucket: Bucket) -> str:
    """The bucket as text. Each tensor is copied into memory of its own: a view would carry its whole base."""
    owned = [(name, tensor.detach().to("cpu", copy=True).contiguous().clone()) for name, tensor in bucket]
    return base64.b64encode(pickle.dumps(owned, protocol=pickle.HIGHEST_PROTOCOL)).decode("ascii")
