"""Checkpoints of every family in quantised formats: what they stand for, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles.arch import load_spec
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
from tests.cpu.families.tiny_checkpoints import CASES, sequences

FORMATS = {"fp8": NumberFormat("fp8"), "int4": NumberFormat("int4", group_size=2)}
"""Groups of two: the widths are odd otherwise."""


STACKED = "feed_forward.experts."


def weights_of(directory: Path) -> dict[str, Tensor]:
    """What the stored tensors stand for."""
    source = open_source(directory)
    found = {}
    for name, weight in source.weights.items():
        parts = {part: source.reader.read(entry) for part, entry in weight.parts.items()}
        found[name] = as_numbers(weight, parts, torch.float32)
    source.reader.close()
    return found


@pytest.mark.parametrize("to", FORMATS)
def test_stacked_experts_are_refused_by_name(to: str, tmp_path: Path) -> None:
    CASES["llama4_text"].save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"no layout for stacked weights.*experts\.gate_up_proj"):
        plan_conversion(open_source(tmp_path / "plain"), tmp_path / "target", Wanted(FORMATS[to]))


# Of a model with experts INT4 takes the experts alone.
@pytest.mark.parametrize(
    ("name", "to"),
    [(name, to) for name in CASES for to in FORMATS if not (to == "int4" and name.startswith("llama4"))],
)
def test_quantised_checkpoints_stand_for_the_rounded_weights(name: str, to: str, tmp_path: Path) -> None:
    CASES[name].save(tmp_path / "plain", std=0.05)
    spec, wanted = load_spec(tmp_path / "plain"), FORMATS[to]
    # Stacked experts stay as they are.
    kept = (STACKED,) if spec.moe is not None and spec.moe.stacked else ()
    asked = Wanted(wanted, kept=kept)
    convert(plan_conversion(open_source(tmp_path / "plain"), tmp_path / "target", asked))
    policy = precision_policy(spec, spec.dtype, wanted, kept=kept)
    exact, found = dict(read_hf(tmp_path / "plain")), weights_of(tmp_path / "target")
    rounded = {key for key in exact if not policy.storage(key).is_plain}
    assert found.keys() == exact.keys() and rounded
    assert not any(key.startswith(spec.other_parts) for key in rounded)
    for key, weight in exact.items():
        expected = dequantised(quantised(wanted, weight)) if key in rounded else weight
        assert torch.equal(found[key], expected), key

    decoder = Decoder(load_spec(tmp_path / "target"))
    load_published(decoder, found.items())
    (tokens,) = sequences(CASES[name], (19,))
    with torch.no_grad():
        hidden = decoder(tokens, torch.arange(19), PackedAttention(torch.tensor([0, 19])), Router.decide())
    assert bool(hidden.isfinite().all())
