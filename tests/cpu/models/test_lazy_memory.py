"""Memory that is taken page by page and can be given back."""

from __future__ import annotations

import sys

import pytest
import torch

from miles.models.lazy_memory import give_back, lazy_zeros

PAGE = 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_zeros_of_the_shape(dtype: torch.dtype) -> None:
    zeros = lazy_zeros((3, 5, 7), dtype)
    assert zeros.shape == (3, 5, 7) and zeros.dtype == dtype and zeros.is_contiguous()
    assert not zeros.any()
    zeros[2, 4, 6] = 1
    assert zeros.sum() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not take single pages back")
def test_whole_pages_inside_a_part_are_given_back_and_nothing_beside_it() -> None:
    memory = lazy_zeros((10 * PAGE,), torch.uint8)
    memory.fill_(1)
    give_back(memory[PAGE // 2 : 4 * PAGE + 1])
    assert memory[:PAGE].all() and memory[4 * PAGE :].all()
    assert not memory[PAGE : 4 * PAGE].any()
    memory[2 * PAGE] = 7
    assert memory[2 * PAGE] == 7, "it is still there to be used"
