"""Shared prompts give what packed sequences give, values and gradients, for any shape of groups."""

from __future__ import annotations

import pytest
import torch

from miles.arch.spec import AttentionSpec, RopeSpec
from miles.models.attention import PackedAttention
from miles.models.prefix_attention import PrefixAttention

SPEC = AttentionSpec(4, 2, 8, RopeSpec(1e4), qkv_bias=False, output_bias=False)

GROUPS = {
    "even": [(5, [3, 2]), (2, [1, 4])],
    "ragged": [(1, [6]), (7, [1, 2, 3]), (3, [2, 2])],
    "a prompt that nobody continues": [(4, [2]), (3, []), (2, [1, 1])],
    "one": [(3, [5])],
}


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_equals_packed_attention_of_the_whole_sequences(groups: list[tuple[int, list[int]]]) -> None:
    prompts = [length for length, _ in groups]
    own = [length for _, lengths in groups for length in lengths]
    prompt_of_own = torch.tensor([g for g, (_, lengths) in enumerate(groups) for _ in lengths])
    prompt_starts, own_starts = offsets(prompts), offsets(own) + sum(prompts)
    # The shared tokens of every whole sequence, one after another; a prompt nobody continues is one as well.
    rows = []
    for n, g in enumerate(prompt_of_own.tolist()):
        prompt = torch.arange(prompt_starts[g], prompt_starts[g + 1])
        rows.append(torch.cat([prompt, torch.arange(own_starts[n], own_starts[n + 1])]))
    for g in set(range(len(prompts))) - set(prompt_of_own.tolist()):
        rows.append(torch.arange(prompt_starts[g], prompt_starts[g + 1]))
    lengths = [len(r) for r in rows]
    flat = torch.cat(rows)

    generator = torch.Generator().manual_seed(0)
    total = sum(prompts) + sum(own)
    q, k, v = (torch.randn(total, h, 8, generator=generator, requires_grad=True) for h in (4, 2, 2))
    shared = PrefixAttention(offsets(prompts), offsets(own), prompt_of_own).attend(0, q, k, v, SPEC)
    packed = PackedAttention(offsets(lengths)).attend(0, q[flat], k[flat], v[flat], SPEC)
    torch.testing.assert_close(shared[flat], packed, atol=1e-6, rtol=0)

    weight = torch.randn(len(flat), 32, generator=generator)
    of_shared = torch.autograd.grad((shared[flat] * weight).sum(), (q, k, v))
    of_packed = torch.autograd.grad((packed * weight).sum(), (q, k, v))
    torch.testing.assert_close(of_shared, of_packed, atol=1e-5, rtol=0)
