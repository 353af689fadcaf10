"""Weights for `/update_weights_from_tensor`: buckets of published tensors, by value.

A payload is base64 of a pickled list of (name, CPU tensor). SGLang unpickles it with an allow-list that knows
torch's own tensors, so no class of SGLang is needed here.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

Bucket = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Announced:
    """What a bucket holds that a process group brings, in the order of its coming. `last`: of its update."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    nbytes: int
    last: bool

    @classmethod
    def of(cls, bucket: Bucket, last: bool) -> Announced:
        tensors = [tensor for _, tensor in bucket]
        return cls(
            names=tuple(name for name, _ in bucket),
            dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
            shapes=tuple(tuple(tensor.shape) for tensor in tensors),
            nbytes=sum(tensor.nbytes for tensor in tensors),
            last=last,
        )


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a group meet: the address of rank 0's store, and what they tell each other."""

    host: str
    port: int
    name: str
    size: int
    backend: str


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
