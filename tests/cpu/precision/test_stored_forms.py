"""The table of stored tensors is what the formats publish: names in order, types, shapes."""

from __future__ import annotations

import pytest
import torch

from miles.arch.precision import NumberFormat
from miles.arch.stored_forms import stored_forms
from miles.precision.weight_format import PLAIN, published, quantised
from miles.weights.safetensors_io import DTYPES

FORMATS = [
    *(NumberFormat(name) for name in ("fp8", "fp8_channel", "fp8_tensor", "mxfp8", "nvfp4", "int4", "int8")),
    NumberFormat("fp8", "pow2"),
    NumberFormat("int4", group_size=64),
    NumberFormat("int4", symmetric=False),
]


@pytest.mark.parametrize("shape", [(37, 192), (128, 256), (1, 64)])
@pytest.mark.parametrize("target", FORMATS, ids=str)
def test_quantised_weights(target: NumberFormat, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = published("a.weight", quantised(target, weight))
    forms = stored_forms(target, "a.weight", shape)
    assert list(found) == list(forms)
    for name, (code, expected) in forms.items():
        assert (found[name].dtype, tuple(found[name].shape)) == (DTYPES[code], expected), name


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_plain_weights_of_any_shape(name: str) -> None:
    for shape in ((), (3,), (2, 3, 5)):
        forms = stored_forms(NumberFormat(name), "a.bias", shape)  # type: ignore[arg-type]
        assert [(DTYPES[code], found) for code, found in forms.values()] == [(PLAIN[name], shape)]
