"""GELU of exact numerics: torch's function, with bits that do not depend on an element's place."""

from __future__ import annotations

import pytest
import torch

from miles.models.geglu import gelu, gelu_of_exp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_element_has_the_same_bits_anywhere(dtype: torch.dtype) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)
    whole = gelu_of_exp(x)
    for start, stop in ((0, 1), (1, 38), (5, 12), (999, 2222), (2990, 3000)):
        assert torch.equal(gelu_of_exp(x[start:stop].clone()), whole[start:stop])


def test_values_and_gradients_are_torchs() -> None:
    x = torch.linspace(-50, 50, 4001, requires_grad=True)
    for function in (gelu, gelu_of_exp):
        torch.testing.assert_close(function(x), gelu(x), atol=1e-6, rtol=2e-6)
    (ours,), (theirs,) = (torch.autograd.grad(function(x).sum(), x) for function in (gelu_of_exp, gelu))
    assert torch.equal(ours, theirs)
