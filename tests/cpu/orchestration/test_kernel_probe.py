"""The probe finds nothing in the kernels as they are, and names what was broken on purpose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miles.arch import load_spec
from miles.data.tasks import resolve_builtin
from miles.models.compiled import build
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.compiled.library import Library
from miles.models.numerics import FAST
from miles.orchestration.kernel_probe import kernels_part
from miles.planning.facts.compiler import read_compiler
from miles.rollout.native.fused import build as decoding

COMPILER = read_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no compiler")
SPEC = load_spec(resolve_builtin("builtin:sort"))


class OtherProducts(CompiledExactNumerics):
    """A trainer whose products are all rounded otherwise."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().linear(x.double().float() * (1 + 2**-20), weight, bias)


class ProductsByBatch(CompiledExactNumerics):
    """Products of many rows have another last bit."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = super().linear(x, weight, bias)
        return out if len(x) <= 70 else torch.nextafter(out, out + 1)


class OtherLogProbs(CompiledExactNumerics):
    def log_softmax(self, logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        return FAST.log_softmax(logits, temperature)


class OtherExperts(CompiledExactNumerics):
    def expert_kernels(self, gate_up: Tensor, down: Tensor) -> Any:
        return FAST.expert_kernels(gate_up, down)


class OtherSharedPrompts(CompiledExactNumerics):
    def prefix_attention(self, *offsets: Tensor) -> Any:
        return FAST.prefix_attention(*offsets)


@pytest.fixture(scope="module")
def kernels() -> tuple[Library, Path]:
    assert COMPILER is not None
    return Library(build.library(COMPILER.path)), decoding.library(COMPILER.path)


@pytest.mark.parametrize(
    ("numerics", "found"),
    [
        (CompiledExactNumerics, None),
        (OtherProducts, "trainer and engine part in layer 0 attention"),
        (ProductsByBatch, "the trainer's layer 0 attention depends on the batch"),
        (OtherExperts, "layer 0 mlp"),
        (OtherLogProbs, "a log-prob drawn in the engine's batch is not the trainer's"),
        (OtherSharedPrompts, "the trainer's attention depends on whether a prompt is shared"),
    ],
)
def test_what_was_broken_is_named(
    numerics: type[CompiledExactNumerics], found: str | None, kernels: tuple[Library, Path]
) -> None:
    library, decode = kernels
    told = kernels_part(SPEC, numerics(library), decode)
    assert (told is None) if found is None else (told is not None and found in told), told


def test_a_model_of_few_positions_is_probed_too(kernels: tuple[Library, Path]) -> None:
    library, decode = kernels
    assert (
        kernels_part(replace(SPEC, max_position_embeddings=16), CompiledExactNumerics(library), decode)
        is None
    )
