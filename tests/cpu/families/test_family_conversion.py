"""Checkpoints of every family in quantised formats: what they stand for, and what is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles.arch import load_spec
from miles.arch.checkpoint import read_json
from miles.arch.expert_layout import is_stack
from miles.arch.precision import NumberFormat, precision_policy
from miles.errors import CheckpointError
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.routing import Router
from miles.precision.weight_format import dequantised, quantised
from miles.weights.convert import Wanted, convert, open_source, plan_conversion
from miles.weights.convert.stored import as_numbers
from miles.weights.hf import read_hf
from miles.weights.native_map import load_published
from miles.weights.stacked_experts import split_stack
from tests.cpu.families.tiny_checkpoints import CASES, sequences

FORMATS = {"fp8": NumberFormat("fp8"), "int4": NumberFormat("int4", group_size=2)}
"""Groups of two: the widths are odd otherwise."""


def weights_of(directory: Path) -> dict[str, Tensor]:
    """What the stored tensors stand for."""
    source = open_source(directory)
    found = {}
    for name, weight in source.weights.items():
        parts = {part: source.reader.read(entry) for part, entry in weight.parts.items()}
        found[name] = as_numbers(weight, parts, torch.float32)
    source.reader.close()
    return found


# Of a model with experts INT4 takes the experts alone.
@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_quantised_checkpoints_stand_for_the_rounded_weights(name: str, to: str, tmp_path: Path) -> None:
    """Experts that are stacked in the plain checkpoint are matrices of their own in a quantised one."""
    CASES[name].save(tmp_path / "plain", std=0.05)
    spec, wanted = load_spec(tmp_path / "plain"), FORMATS[to]
    converted(tmp_path / "plain", tmp_path / "target", wanted)
    policy = precision_policy(spec, spec.dtype, wanted)
    exact, found = split(dict(read_hf(tmp_path / "plain"))), weights_of(tmp_path / "target")
    rounded = {key for key in exact if not policy.storage(key).is_plain}
    assert found.keys() == exact.keys() and rounded
    assert not any(key.startswith(spec.other_parts) for key in rounded)
    assert spec.moe is None or all(key in rounded for key in exact if ".experts." in key)
    for key, weight in exact.items():
        expected = dequantised(quantised(wanted, weight)) if key in rounded else weight
        assert torch.equal(found[key], expected), key

    decoder = Decoder(load_spec(tmp_path / "target"))
    load_published(decoder, found.items())
    (tokens,) = sequences(CASES[name], (19,))
    with torch.no_grad():
        hidden = decoder(tokens, torch.arange(19), PackedAttention(torch.tensor([0, 19])), Router.decide())
    assert bool(hidden.isfinite().all())


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with stacked experts."""
    directory = tmp_path_factory.mktemp("llama4") / "plain"
    CASES["llama4_text"].save(directory, std=0.05)
    return directory


def test_experts_are_matrices_as_linear_layers_have_them(llama4: Path, tmp_path: Path) -> None:
    converted(llama4, tmp_path / "target", NumberFormat("fp8_channel"))
    stored, plain = dict(read_hf(tmp_path / "target")), dict(read_hf(llama4))
    block = "model.layers.1.feed_forward.experts"
    gate_up, down = plain[f"{block}.gate_up_proj"], plain[f"{block}.down_proj"]
    width = gate_up.shape[2] // 2
    for expert in range(len(gate_up)):
        for part, matrix in (
            ("gate_proj", gate_up[expert, :, :width].T),
            ("up_proj", gate_up[expert, :, width:].T),
            ("down_proj", down[expert].T),
        ):
            name = f"{block}.{expert}.{part}.weight"
            assert stored[name].dtype == torch.float8_e4m3fn and stored[name].shape == matrix.shape
            assert stored[f"{name}_scale"].shape == (len(matrix), 1)
            error = stored[name].float() * stored[f"{name}_scale"] - matrix
            assert error.abs().max() <= matrix.abs().max() / 16
    ignored = read_json(tmp_path / "target" / "config.json")["quantization_config"]["ignore"]
    assert not any(".experts" in module for module in ignored)


@pytest.mark.parametrize("by", ["fp8", "dcp"])
def test_stacked_experts_come_back_bit_for_bit(by: str, llama4: Path, tmp_path: Path) -> None:
    """Layers that are kept plain come back as they were; through DCP the other layers are rounded once."""
    fp8 = NumberFormat("fp8")
    if by == "dcp":
        convert(plan_conversion(open_source(llama4), tmp_path / "dcp", Wanted(layout="dcp")))
    converted(llama4 if by == "fp8" else tmp_path / "dcp", tmp_path / "split", fp8, first_layers=2)
    converted(tmp_path / "split", tmp_path / "again", NumberFormat("fp32"))
    before, after = dict(read_hf(llama4)), dict(read_hf(tmp_path / "again"))
    rounded = dict(split(before) | weights_of(tmp_path / "split"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        own = split({name: tensor})
        assert all(torch.equal(part, rounded[key]) for key, part in own.items()), name
        if ".layers.0." in name or ".layers.1." in name:
            assert torch.equal(tensor, before[name]), name
    assert load_spec(tmp_path / "again") == load_spec(llama4)
    CASES["llama4_text"].load(tmp_path / "again")


def test_a_split_checkpoint_of_plain_numbers_loads_and_a_damaged_one_is_named(llama4: Path) -> None:
    spec, plain = load_spec(llama4), dict(read_hf(llama4))
    stacked, matrices = Decoder(spec), Decoder(spec)
    load_published(stacked, plain.items())
    load_published(matrices, split(plain).items())
    for ours, theirs in zip(matrices.parameters(), stacked.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    name = "model.layers.1.feed_forward.experts.2.up_proj.weight"
    lacking = {key: tensor for key, tensor in split(plain).items() if key != name}
    with pytest.raises(
        CheckpointError, match=r"missing \(1\): model\.layers\.1\.feed_forward\.experts\.gate_up_proj"
    ):
        load_published(Decoder(spec), lacking.items())
    wrong = split(plain) | {name: torch.zeros(3, 3)}
    with pytest.raises(CheckpointError, match=r"unexpected .*experts\.2\.up_proj"):
        load_published(Decoder(spec), wrong.items())


def test_an_exception_by_the_name_of_the_stack_is_refused(llama4: Path, tmp_path: Path) -> None:
    asked = Wanted(NumberFormat("fp8"), kept=("experts.gate_up_proj",))
    with pytest.raises(CheckpointError, match=r"no tensor of the target has experts\.gate_up_proj"):
        plan_conversion(open_source(llama4), tmp_path / "target", asked)
    kept = plan_conversion(
        open_source(llama4), tmp_path / "target", Wanted(NumberFormat("fp8"), kept=("experts.",))
    )
    assert {one.how for one in kept.moves if ".experts." in one.name} == {"copied"}, "all kept: as published"


def converted(source: Path, target: Path, to: NumberFormat, **more) -> None:
    convert(plan_conversion(open_source(source), target, Wanted(to, **more)))


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with stacked experts cut into matrices."""
    found = {}
    for name, tensor in tensors.items():
        found |= dict(split_stack(name, tensor)) if is_stack(name) else {name: tensor}
    return found
