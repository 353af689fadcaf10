"""Checkpoints that `miles convert` writes, loaded whole by transformers and by compressed-tensors through it:
every weight is the one that our own reader finds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import DENSE, MOE, converted, make_checkpoint, weights_of
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from miles.arch.precision import NumberFormat

WHOLE_BLOCKS = {"hidden_size": 256, "head_dim": 128}
"""transformers dequantises whole FP8 blocks only."""
FORMATS = {
    "fp8": NumberFormat("fp8"),
    "fp8-pow2": NumberFormat("fp8", "pow2"),
    "mxfp8": NumberFormat("mxfp8"),
    "fp8_channel": NumberFormat("fp8_channel"),
    "fp8_tensor": NumberFormat("fp8_tensor"),
    "int4": NumberFormat("int4"),
    "int4-g128": NumberFormat("int4", group_size=128),
    "int4-asymmetric": NumberFormat("int4", symmetric=False),
    "int8": NumberFormat("int8"),
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DENSE | WHOLE_BLOCKS | {"intermediate_size": 384}
    return make_checkpoint(tmp_path_factory.mktemp("readers") / "base", config)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MOE | WHOLE_BLOCKS | {"moe_intermediate_size": 128}
    return make_checkpoint(tmp_path_factory.mktemp("readers") / "base", config)


def loaded(directory: Path, stored: NumberFormat) -> dict[str, Tensor]:
    """The weights that transformers finds, dequantised, under its own names."""
    how: dict[str, Any] = {}
    if stored.name not in ("fp8", "mxfp8"):
        how = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **how)
    weights: dict[str, Tensor] = model.state_dict()
    return weights


@pytest.mark.parametrize("form", FORMATS)
def test_a_dense_checkpoint(form: str, dense: Path, tmp_path: Path) -> None:
    converted(dense, tmp_path / "target", FORMATS[form], last_layers=1)
    theirs, ours = loaded(tmp_path / "target", FORMATS[form]), weights_of(tmp_path / "target", torch.bfloat16)
    assert theirs.keys() == ours.keys()
    for name, weight in ours.items():
        assert torch.equal(theirs[name], weight), name


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("int4-asymmetric", "int8")])
def test_a_mixture_of_experts(form: str, moe: Path, tmp_path: Path) -> None:
    """transformers stacks the experts; those of INT8 and of INT4 with zeros it does not find."""
    converted(moe, tmp_path / "target", FORMATS[form])
    theirs = loaded(tmp_path / "target", FORMATS[form])
    for name, weight in weights_of(tmp_path / "target", torch.bfloat16).items():
        assert torch.equal(unstacked(theirs, name), weight), name


def unstacked(theirs: dict[str, Tensor], name: str) -> Tensor:
    """A published tensor out of those of transformers."""
    if ".experts." not in name:
        return theirs[name]
    layer, expert, projection, _ = name.rsplit(".", 3)
    if projection == "down_proj":
        return theirs[f"{layer}.down_proj"][int(expert)]
    gate, up = theirs[f"{layer}.gate_up_proj"][int(expert)].chunk(2)
    return gate if projection == "gate_proj" else up
