"""Segments in grids of like length give what sequences give one by one, values and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from miles.arch.spec import AttentionSpec, RopeSpec
from miles.models.attention import PackedAttention
from miles.models.row_grids import RowGrids, like_lengths
from miles.models.segment_attention import SegmentAttention

SPEC = AttentionSpec(4, 2, 8, RopeSpec(1e4), qkv_bias=False, output_bias=False)

GROUPS = {
    "even": [(5, [3, 3]), (5, [3, 3])],
    "ragged": [(1, [6]), (37, [1, 2, 90]), (3, [2, 2]), (37, [40])],
    "a prompt that nobody continues": [(4, [2]), (30, []), (2, [1, 1])],
    "prompts of one length apart": [(4, [2, 5]), (6, [1]), (4, [3, 3])],
    "long": [(150, [130, 7, 61]), (3, [200])],
    "one": [(3, [5])],
}


def offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def inputs(total: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v as a decoder hands them over: parts of one tensor."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(total, 8, 8, generator=generator).to(dtype).requires_grad_()
    return [heads, *heads.split((4, 2, 2), 1)]


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sequence, [n, H * d], from the definition."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * SPEC.head_dim**-0.5
    ahead = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v).flatten(1)


@pytest.mark.parametrize("lengths", [[1], [300], [4, 4, 4], [3, 90, 1, 17, 16, 88, 250]])
def test_packed_sequences(lengths: list[int]) -> None:
    heads, q, k, v = inputs(sum(lengths))
    out = SegmentAttention(offsets(lengths)).attend(0, q, k, v, SPEC)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    expected = torch.cat([alone(*part) for part in parts])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad((out * weight).sum(), heads)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), heads)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def whole_sequences(groups: list[tuple[int, list[int]]]) -> Iterator[torch.Tensor]:
    """The shared tokens that each continuation, or each prompt without one, reads in turn."""
    prompt_starts = offsets([length for length, _ in groups])
    start = prompt_starts[-1]
    for (length, own), begin in zip(groups, prompt_starts, strict=False):
        prompt = torch.arange(begin, begin + length)
        for own_length in own:
            yield torch.cat([prompt, torch.arange(start, start + own_length)])
            start += own_length
        if not own:
            yield prompt


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_shared_prompts_equal_whole_sequences(groups: list[tuple[int, list[int]]]) -> None:
    own = [length for _, lengths in groups for length in lengths]
    prompt_of = np.array([g for g, (_, lengths) in enumerate(groups) for _ in lengths])
    cu_seqlens = offsets([length for length, _ in groups] + own)
    heads, q, k, v = inputs(int(cu_seqlens[-1]))
    shared = SegmentAttention(cu_seqlens, prompt_of).attend(0, q, k, v, SPEC)
    weights = torch.randn(shared.shape, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(())
    for rows in whole_sequences(groups):
        of_whole = alone(q[rows], k[rows], v[rows])
        torch.testing.assert_close(shared[rows], of_whole, atol=1e-5, rtol=0)
        total = total + (of_whole * weights[rows]).sum()
    # A prompt row is read once per continuation: its weight counts as often.
    reads = torch.bincount(torch.cat(list(whole_sequences(groups))), minlength=len(q)).unsqueeze(1)
    (got,) = torch.autograd.grad((shared * weights * reads).sum(), heads)
    (wanted,) = torch.autograd.grad(total, heads)
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=0)


def test_bf16_is_as_near_as_the_packed_kernels() -> None:
    lengths = [60, 3, 140]
    heads, q, k, v = inputs(sum(lengths), torch.bfloat16)
    out = SegmentAttention(offsets(lengths)).attend(0, q, k, v, SPEC)
    packed = PackedAttention(torch.from_numpy(offsets(lengths))).attend(0, q, k, v, SPEC)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, packed, atol=2e-2, rtol=0)
    (got,), (wanted,) = (torch.autograd.grad(x.float().square().sum(), heads) for x in (out, packed))
    torch.testing.assert_close(got, wanted, atol=0.1, rtol=0.05)


def test_bf16_shared_prompts() -> None:
    cu_seqlens, prompt_of = offsets([40, 50, 9]), np.array([0, 0])
    heads, q, k, v = inputs(99, torch.bfloat16)
    out = SegmentAttention(cu_seqlens, prompt_of).attend(0, q, k, v, SPEC)
    wide, *parts = inputs(99)
    expected = SegmentAttention(cu_seqlens, prompt_of).attend(0, *parts, SPEC)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=0)
    (got,) = torch.autograd.grad(out.float().square().sum(), heads)
    (wanted,) = torch.autograd.grad(expected.square().sum(), wide)
    torch.testing.assert_close(got.float(), wanted, atol=0.1, rtol=0.05)


def test_grids_hold_every_range_once_with_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 60)
    members = like_lengths(lengths)
    assert sorted(np.concatenate(members)) == list(range(60))
    cells = sum(len(m) * lengths[m].max() for m in members)
    assert cells < 1.2 * lengths.sum()
    assert len(members) < 20


def test_rows_come_back_in_their_order() -> None:
    lengths = np.array([5, 40, 7, 40, 21])
    starts = offsets(lengths.tolist())[:-1] + 3
    x = torch.randn(3 + int(lengths.sum()), 2, 4)
    grids = RowGrids(starts, lengths, x.device)
    assert torch.equal(grids.put([grid.take(x) for grid in grids.grids]), x[3:])
    for grid, members in zip(grids.grids, grids.members, strict=True):
        zeroed = grid.take(x, zero_padding=True)
        for row, member in zip(zeroed, members, strict=True):
            assert torch.equal(row[:, lengths[member] :], torch.zeros_like(row[:, lengths[member] :]))
