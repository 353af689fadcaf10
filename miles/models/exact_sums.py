"""The sums of exact attention, each in one order on both sides of a run (see `exact_attention`).

Shapes: B batch of (sequence, key head), M query rows, S padded keys, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from miles.arch.spec import AttentionSpec
from miles.models.invariant import bmm, softmax
from miles.models.softcap import softcapped
from miles.models.visible import first_seen

KEY_STEP = 16
"""Keys are padded to a whole number of these: the width of the widest vector registers."""
KEY_BLOCK = 128
"""Keys whose values are summed by one product."""
QUERY_STEP = 8
"""Packed queries come in whole steps, so `min_queries` up to this costs nothing there."""
CUDA_LANES = 1024
"""Running sums in which softmax adds a row on CUDA."""


def padded_keys(count: int) -> int:
    """Width to which `count` keys are padded."""
    return -(-count // KEY_STEP) * KEY_STEP


def first_key(spec: AttentionSpec, position: int, device: torch.device) -> int:
    """Keys before this one are left out for queries from `position` on: a whole number of blocks of the sum
    over values, and of the lanes of the softmax."""
    step = KEY_BLOCK if device.type == "cpu" else CUDA_LANES
    return first_seen(spec, position) // step * step


def scores_of(q: Tensor, k: Tensor, softcap: float | None) -> Tensor:
    """Scaled queries q [B, M, d] against k [B, S, d] in fp32, see `AttentionSpec.softcap`: [B, M, S]."""
    return softcapped(bmm(q, k.transpose(1, 2)), softcap)


def probabilities(scores: Tensor, masked_from: int, mask: Tensor) -> Tensor:
    """softmax(scores + mask) of fp32 scores [B, M, S], which are written over.

    Args:
        mask: 0 or -inf, added to the keys from `masked_from` on; broadcast to [B, M, S - masked_from].
    """
    scores[..., masked_from:].add_(mask)
    return softmax(scores)


def weighted_values(p: Tensor, v: Tensor) -> Tensor:
    """p [B, M, S] @ v [B, S, d], block after block, all in fp32."""
    return weighted_blocks(p.split(KEY_BLOCK, 2), v.split(KEY_BLOCK, 1))


def weighted_blocks(p: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> Tensor:
    """The same of blocks [B, M, KEY_BLOCK] and [B, KEY_BLOCK, d], the last of which may be shorter."""
    total = bmm(p[0], v[0])
    for p_block, v_block in zip(p[1:], v[1:], strict=True):
        total += bmm(p_block, v_block)
    return total
