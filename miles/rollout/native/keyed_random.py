"""Random numbers that belong to a sample and a position, not to a batch.

The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): the
output at counter c of a stream is mix(stream + c * GOLDEN). A stream starts at mix(mix(seed) + sample_key *
STREAM_GAMMA), so every (seed, sample_key) pair has its own. Integers are uint64 held in int64: addition,
multiplication and xor wrap to the same bits, and a logical shift is an arithmetic shift with the sign bits
masked off.
"""

from __future__ import annotations

import torch

_WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
STREAM_GAMMA = 0xD1342543DE82EF95
ACCEPT, REPLACE, DRAFT = 1, 2, 3
"""Purposes with a random stream of their own beside the plain draw (see `substream`)."""
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MANTISSA_BITS = 52


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    word %= _WORD
    return word - _WORD if word >> 63 else word


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64 words, element by element."""
    x = (x ^ _shift_right(x, 30)).mul_(_signed(_MIX_1))
    x = (x ^ _shift_right(x, 27)).mul_(_signed(_MIX_2))
    return x ^ _shift_right(x, 31)


def streams(seed: int, sample_keys: torch.Tensor) -> torch.Tensor:
    """The start of each sample's stream: int64 [N] from int64 sample keys [N]."""
    root = mix(torch.tensor([_signed(seed)], dtype=torch.int64, device=sample_keys.device))
    return mix(root + sample_keys * _signed(STREAM_GAMMA))


def substream(stream: torch.Tensor, purpose: int) -> torch.Tensor:
    """A sample's stream for another purpose than the plain draw; `purpose` is not 0."""
    return mix(stream ^ mix(torch.full_like(stream, purpose)))


def uniform(stream: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One number per row, float64 [N], strictly between 0 and 1.

    The 52 high bits, centred in their cell: (bits + 0.5) * 2^-52 is exact in float64, and neither 0 nor 1
    occurs.
    """
    word = mix(stream + (position + 1) * _signed(GOLDEN))
    return _shift_right(word, 64 - _MANTISSA_BITS).to(torch.float64).add_(0.5).mul_(2.0**-_MANTISSA_BITS)
