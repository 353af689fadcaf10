"""Rotary position embedding.

Published checkpoints rotate dimension i together with i + d/2 ("half" layout). `rotate` multiplies complex
numbers and leaves each such pair side by side: queries and keys are permuted alike, so their products stay
the same. `rotate_halves` keeps the layout and rounds every product and sum on its own, so that an element's
bits do not depend on its place in the batch. A rotation narrower than the heads turns their first elements.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from miles.arch.spec import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling


@lru_cache(maxsize=8)
def rotations(rope: RopeSpec, width: int, num_positions: int, device: torch.device) -> Tensor:
    """exp(i · position · frequency), complex64 [num_positions, width / 2]; shared by all who ask alike."""
    turns = angles(rope, width, num_positions, device)
    return torch.polar(torch.full_like(turns, _magnitude(rope)), turns)


@lru_cache(maxsize=8)
def half_rotations(rope: RopeSpec, width: int, num_positions: int, device: torch.device) -> Tensor:
    """fp32 [num_positions, 2, width]: (cos, cos), and (-sin, sin) for the other half."""
    turns = angles(rope, width, num_positions, device)
    cos, sin = turns.cos() * _magnitude(rope), turns.sin() * _magnitude(rope)
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1)


def angles(rope: RopeSpec, width: int, num_positions: int, device: torch.device) -> Tensor:
    """fp32 [num_positions, width / 2], radians: how far each pair turns at each position."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / rope.theta**exponents
    if isinstance(rope.scaling, LinearScaling):
        frequencies = frequencies / rope.scaling.factor
    elif isinstance(rope.scaling, Llama3Scaling):
        frequencies = _slowed(frequencies, rope.scaling)
    elif isinstance(rope.scaling, YarnScaling):
        frequencies = _ramped(frequencies, rope.theta, rope.scaling)
    return torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)


def _slowed(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """See `Llama3Scaling`."""
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _ramped(frequencies: Tensor, theta: float, scaling: YarnScaling) -> Tensor:
    """See `YarnScaling`. The ramp is linear in the number of the pair, between whole numbers."""
    pairs = len(frequencies)

    def pair_of(turns: float) -> float:
        wavelengths = scaling.original_positions / (turns * 2 * math.pi)
        return pairs * math.log(wavelengths) / math.log(theta)

    first = max(math.floor(pair_of(scaling.fast_turns)), 0)
    last = min(math.ceil(pair_of(scaling.slow_turns)), 2 * pairs - 1)
    steps = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    slowed = ((steps - first) / (last - first if last != first else 1e-3)).clamp(0, 1)
    return slowed * frequencies / scaling.factor + (1 - slowed) * frequencies


def _magnitude(rope: RopeSpec) -> float:
    return rope.scaling.magnitude if isinstance(rope.scaling, YarnScaling) else 1.0


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotate heads [T, H, d] by rotation [T, w/2] (complex64), w <= d; the result has their dtype."""
    width = 2 * rotation.shape[-1]
    if width < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :width], rotation), heads[..., width:]), -1)
    if torch.is_grad_enabled() and heads.requires_grad:
        return _Rotate.apply(heads, rotation.unsqueeze(1))
    return _rotate(heads, rotation.unsqueeze(1))


def rotate_halves(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotate heads [T, H, d] by rotation [T, 2, w] (fp32), w <= d; the result has their dtype."""
    width = rotation.shape[-1]
    if width < heads.shape[-1]:
        return torch.cat((rotate_halves(heads[..., :width], rotation), heads[..., width:]), -1)
    cos, sin = rotation.split_with_sizes((1, 1), 1)
    if torch.is_grad_enabled() and heads.requires_grad:
        return _RotateHalves.apply(heads, cos, sin)
    return _rotate_halves(heads, cos, sin)


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    first, second = heads.float().chunk(2, -1)
    return torch.view_as_real(torch.complex(first, second).mul_(rotation)).flatten(-2).to(heads.dtype)


def _rotate_halves(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = heads.float()
    other = wide.roll(heads.shape[-1] // 2, -1).mul_(sin)
    return torch.mul(wide, cos).add_(other).to(heads.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, rotation: Tensor) -> Tensor:
        ctx.save_for_backward(rotation)
        return _rotate(heads, rotation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        pairs = grad.float().contiguous().unflatten(-1, (-1, 2))
        turned_back = torch.view_as_real(torch.view_as_complex(pairs) * rotation.conj())
        return torch.cat(turned_back.unbind(-1), -1).to(grad.dtype), None


class _RotateHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_halves(heads, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_halves(grad, cos, -sin), None, None
