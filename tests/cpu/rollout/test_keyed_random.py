"""The random number of a sample at a position: SplitMix64, the same in any batch."""

from __future__ import annotations

import numpy as np
import torch

from miles.rollout.native.keyed_random import GOLDEN, STREAM_GAMMA, mix, streams, uniform

WORD = 1 << 64


def splitmix_mix(z: int) -> int:
    """The published finaliser on Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def reference_uniform(seed: int, key: int, position: int) -> float:
    stream = splitmix_mix((splitmix_mix(seed % WORD) + key * STREAM_GAMMA) % WORD)
    word = splitmix_mix((stream + (position + 1) * GOLDEN) % WORD)
    return ((word >> 12) + 0.5) * 2.0**-52


def test_mix_matches_the_published_algorithm_bit_for_bit() -> None:
    words = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0xDEADBEEFCAFEBABE]
    signed = torch.tensor([w - WORD if w >> 63 else w for w in words])
    assert [int(x) % WORD for x in mix(signed)] == [splitmix_mix(w) for w in words]


def test_splitmix_reproduces_its_reference_sequence() -> None:
    # First three outputs of splitmix64.c (Vigna) from state 1234567.
    states = [(1234567 + (i + 1) * GOLDEN) % WORD for i in range(3)]
    signed = torch.tensor([s - WORD if s >> 63 else s for s in states])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(x) % WORD for x in mix(signed)] == expected


def test_uniform_depends_on_seed_key_and_position_only() -> None:
    keys = torch.tensor([0, 1, -5, 2**62])
    positions = torch.tensor([3, 3, 10, 0])
    drawn = uniform(streams(42, keys), positions)
    expected = [reference_uniform(42, int(k), int(p)) for k, p in zip(keys, positions, strict=True)]
    assert drawn.tolist() == expected
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(uniform(streams(42, keys[order]), positions[order]), drawn[order])
    assert not torch.equal(uniform(streams(43, keys), positions), drawn)


def test_uniform_is_uniform_and_uncorrelated_along_keys_and_positions() -> None:
    keys, positions = 400, 256
    stream = streams(7, torch.arange(keys))
    grid = torch.stack([uniform(stream, torch.full((keys,), p)) for p in range(positions)], dim=1).numpy()
    assert grid.min() > 0 and grid.max() < 1
    counts = np.histogram(grid, bins=64, range=(0, 1))[0]
    expected = grid.size / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 103.4, "99.9 % quantile of chi-square with 63 degrees of freedom"
    bound = 4 / np.sqrt(grid.size)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < bound
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < bound
