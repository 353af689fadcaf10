"""Block FP8 and grouped INT4: the convention, the edges, the error."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from miles.arch.precision import FormatName, NumberFormat, PrecisionPolicy
from miles.errors import ConfigError
from miles.precision import fp8_block, int4_group
from miles.precision.weight_format import PLAIN, dequantised, in_format, published, quantised, rounded


def weights(rows: int = 300, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def relative_error(rounded: torch.Tensor, exact: torch.Tensor) -> float:
    return float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_fp8_rounds_each_block_to_448_steps_of_its_own_peak(scale_format) -> None:
    weight = weights()
    stored = fp8_block.quantise(weight, scale_format)
    assert stored.values.dtype == torch.float8_e4m3fn and stored.values.shape == weight.shape
    assert stored.scales.shape == (3, 2), "the last block of rows is 44 high"
    for row in range(3):
        for column in range(2):
            rows, columns = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            block, scale = weight[rows, columns], stored.scales[row, column]
            peak = block.abs().max() / 448
            if scale_format == "fp32":
                assert scale == peak
            else:
                assert peak <= scale < 2 * peak and torch.frexp(scale).mantissa == 0.5
            by_hand = (block / scale).to(torch.float8_e4m3fn).float() * scale
            torch.testing.assert_close(fp8_block.dequantise(stored)[rows, columns], by_hand, rtol=0, atol=0)


def test_fp8_stored_again_is_the_same() -> None:
    once = fp8_block.dequantise(fp8_block.quantise(weights()))
    torch.testing.assert_close(fp8_block.dequantise(fp8_block.quantise(once)), once, rtol=1e-6, atol=0)


def test_a_block_of_zeros_stays_zero() -> None:
    for stored in (fp8_block.quantise(torch.zeros(130, 4)), fp8_block.quantise(torch.zeros(1, 1), "pow2")):
        assert torch.equal(fp8_block.dequantise(stored), torch.zeros(stored.values.shape))
    assert not int4_group.dequantise(int4_group.quantise(torch.zeros(2, 8), 4)).any()


def test_int4_rounds_each_group_of_a_row_to_fifteen_values() -> None:
    weight = weights(5, 96)
    stored = int4_group.quantise(weight, 32)
    assert stored.values.dtype == torch.int8 and stored.scales.shape == (5, 3)
    assert stored.values.abs().max() == 7
    group, scale = weight[3, 32:64], stored.scales[3, 1]
    assert scale == group.abs().max() / 7
    torch.testing.assert_close(
        int4_group.dequantise(stored)[3, 32:64], (group / scale).round() * scale, rtol=0, atol=0
    )


def test_the_error_is_that_of_the_format() -> None:
    """Gaussian weights: 2.6 % in e4m3, 11 % in INT4 with groups of 32, more with wider groups."""
    weight = weights(1024, 1024)
    fp8 = relative_error(fp8_block.dequantise(fp8_block.quantise(weight)), weight)
    narrow, wide = (
        relative_error(int4_group.dequantise(int4_group.quantise(weight, g)), weight) for g in (32, 128)
    )
    assert 0.02 < fp8 < 0.03
    assert 0.09 < narrow < 0.13 and narrow < wide


def test_groups_that_do_not_fill_a_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 48 weights cannot be cut into INT4 groups of 32"):
        int4_group.quantise(torch.zeros(2, 48), 32)


EXPERT = "model.layers.0.mlp.experts.0.up_proj.weight"


def test_a_plain_format_casts_everything_and_a_quantised_one_leaves_the_rest_its_type() -> None:
    named = {EXPERT: weights(4, 32), "model.norm.weight": torch.ones(32)}
    cast = dict(in_format(named.items(), PrecisionPolicy(NumberFormat("bf16"))))
    assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}
    seen = dict(in_format(named.items(), PrecisionPolicy(NumberFormat("int4"))))
    assert seen["model.norm.weight"] is named["model.norm.weight"]
    error = relative_error(seen[EXPERT], weights(4, 32))
    assert 0.05 < error < 0.2


@pytest.mark.parametrize("name", [n for n in get_args(FormatName) if n not in PLAIN])
def test_every_quantised_format_of_the_policy_reaches_an_engine_and_a_checkpoint(name: FormatName) -> None:
    policy, weight = PrecisionPolicy(NumberFormat(name)), weights(32, 64)
    seen = rounded(policy, EXPERT, weight)
    assert seen.dtype == torch.float32 and 0.001 < relative_error(seen, weight) < 0.2
    stored = quantised(policy.storage(EXPERT), weight)
    assert torch.equal(dequantised(stored), seen)
    assert sum(t.nbytes for t in published(EXPERT, stored).values()) < weight.nbytes * 0.4
