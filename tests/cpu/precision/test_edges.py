"""What all formats do alike: zeros, odd shapes, numbers that are not finite, strips, fake quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from miles.errors import MilesError
from miles.precision import blocks, fp8_block, fp8_scaled, int4_group, int8, mxfp8, nvfp4


@dataclass(frozen=True)
class Format:
    """One format with its options; `span`: numbers of a row that share a scale, None for all of them."""

    module: Any
    span: int | None
    options: dict[str, Any]
    whole: bool = False
    """Whether one scale covers all rows as well."""

    def quantise(self, weight: Tensor) -> Any:
        return self.module.quantise(weight, **self.options)

    def round_trip(self, weight: Tensor) -> Tensor:
        found: Tensor = self.module.dequantise(self.quantise(weight))
        return found

    def fake(self, weight: Tensor) -> Tensor:
        found: Tensor = self.module.fake_quantise(weight, **self.options)
        return found


FORMATS = {
    "fp8 block": Format(fp8_block, 128, {}, whole=True),
    "fp8 block pow2": Format(fp8_block, 128, {"scale_format": "pow2"}, whole=True),
    "fp8 activations": Format(fp8_block, 128, {"block": fp8_block.ACTIVATIONS}),
    "fp8 channel": Format(fp8_scaled, None, {"extent": "channel"}),
    "fp8 tensor": Format(fp8_scaled, None, {"extent": "tensor"}, whole=True),
    "mxfp8": Format(mxfp8, 32, {}),
    "mxfp8 floor": Format(mxfp8, 32, {"scaling": "floor"}),
    "nvfp4": Format(nvfp4, 16, {}),
    "int4": Format(int4_group, 32, {"group_size": 32}),
    "int4 asymmetric": Format(int4_group, 32, {"group_size": 32, "symmetric": False}),
    "int4 bf16 scales": Format(int4_group, 32, {"group_size": 32, "scale_dtype": torch.bfloat16}),
    "int8": Format(int8, None, {}),
}
every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


@every_format
def test_zeros_stay_zeros_alone_and_beside_other_blocks(form: Format) -> None:
    assert torch.equal(form.round_trip(torch.zeros(3, 64)), torch.zeros(3, 64))
    matrix = weights(256, 256)
    matrix[:128, :128] = 0
    assert not form.round_trip(matrix)[:128, :128].any() and form.round_trip(matrix)[128:].any()


@every_format
@pytest.mark.parametrize("shape", [(1, 32), (129, 32), (300, 320), (5, 416)])
def test_a_shape_that_is_not_whole_blocks_is_rounded_as_its_parts_are(form: Format, shape: Any) -> None:
    matrix = weights(*shape)
    rounded = form.round_trip(matrix)
    assert rounded.shape == shape and rounded.dtype == torch.float32
    if form.span:
        part = matrix[-(shape[0] % 128 or 128) :, : 128 if shape[1] > 128 else shape[1]]
        if form.module is nvfp4:
            stored = nvfp4.quantise(part, nvfp4.outer_scale(matrix))
            assert torch.equal(nvfp4.dequantise(stored), rounded[-len(part) :, : part.shape[1]])
        else:
            assert torch.equal(form.round_trip(part), rounded[-len(part) :, : part.shape[1]])


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "int4"])
def test_groups_that_do_not_fill_a_row_are_refused(name: str) -> None:
    with pytest.raises(MilesError, match=r"rows of 40 weights cannot be cut into .* groups of"):
        FORMATS[name].quantise(weights(2, 40))


@every_format
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_number_that_is_not_finite_makes_its_block_nan_and_is_never_published(
    form: Format, bad: float
) -> None:
    matrix = weights(256, 256)
    matrix[0, 3] = bad
    hurt = form.round_trip(matrix).isnan()
    rows = slice(0, (128 if form.span else 256) if form.whole else 1)
    assert hurt[rows, : form.span or 256].all()
    if form.module is not nvfp4:
        assert hurt.sum() == (hurt[rows, : form.span or 256]).numel(), "other blocks are not touched"
    else:
        shared = nvfp4.quantise(matrix, nvfp4.outer_scale(weights(256, 256)))
        assert nvfp4.dequantise(shared).isnan().sum() == 16, "with a given outer scale only its group"
    with pytest.raises(MilesError, match=r"a\.weight has infinities or NaN in \d+ of its \d+ blocks"):
        form.module.published("a.weight", form.quantise(matrix))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8 activations"])
def test_what_is_published_is_read_back_as_the_same_weights(name: str) -> None:
    form = FORMATS[name]
    stored = form.quantise(weights(130, 96))
    tensors = form.module.published("a.weight", stored)
    assert all(name.startswith("a.weight") and tensor.is_contiguous() for name, tensor in tensors.items())
    again = form.module.from_published("a.weight", tensors)
    assert torch.equal(form.module.dequantise(again), form.module.dequantise(stored))


@every_format
def test_strips_give_what_the_whole_matrix_gives(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = weights(300, 320)
    before = matrix.clone()
    whole = form.round_trip(matrix)
    monkeypatch.setattr(blocks, "STRIP", 1)
    assert torch.equal(form.round_trip(matrix), whole)
    assert torch.equal(matrix, before), "the weights themselves are left alone"


@every_format
def test_rounding_twice_changes_nothing_more_than_the_last_bits(form: Format) -> None:
    once = form.round_trip(weights(130, 96))
    torch.testing.assert_close(form.round_trip(once), once, rtol=0.02, atol=1e-3)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantisation_rounds_forward_and_is_the_identity_backward(form: Format, dtype: Any) -> None:
    weight = weights(40, 64).to(dtype).requires_grad_()
    rounded = form.fake(weight)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, form.round_trip(weight.detach()).to(dtype))
    assert not torch.equal(rounded, weight)
    gradient = torch.randn(40, 64).to(dtype)
    rounded.backward(gradient)
    assert torch.equal(weight.grad, gradient)  # type: ignore[arg-type]


def test_activations_of_any_shape_are_rounded_by_token() -> None:
    tokens = partial(fp8_block.fake_quantise, block=fp8_block.ACTIVATIONS)
    batch = weights(6, 320)
    assert torch.equal(tokens(batch.view(2, 3, 320)), tokens(batch).view(2, 3, 320))
    assert torch.equal(tokens(batch)[2], tokens(batch[2])), "a token does not depend on its neighbours"


def test_gate_and_up_share_an_outer_scale() -> None:
    gate, up = weights(8, 32), 3 * weights(8, 32)
    outer = nvfp4.outer_scale(gate, up)
    fused = nvfp4.quantise(torch.cat((gate, up)))
    assert torch.equal(nvfp4.quantise(gate, outer).codes, fused.codes[:8]) and torch.equal(outer, fused.outer)
    assert not torch.equal(nvfp4.quantise(gate).scales.float(), fused.scales[:8].float())
