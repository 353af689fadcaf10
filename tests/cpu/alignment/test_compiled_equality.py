"""Compiled exact numerics: the decode kernel and the trainer give every token the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alignment_support import QUICKSTART, SPECS, Sides, Traffic
from test_bit_equality import CASES, MIXED

from miles.arch.spec import ArchSpec, DenseMlpSpec
from miles.models.compiled import build
from miles.models.compiled.exact import CompiledExactNumerics
from miles.models.compiled.library import Library
from miles.models.hidden_states import first_difference, hidden_states, joined, stage_names
from miles.models.numerics import FAST
from miles.planning.facts.compiler import read_compiler
from miles.rollout.native.fused import build as decoding
from miles.training.native.forward import forward, make_router
from miles.training.native.micro_batches import make_micro_batch

COMPILER = read_compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no compiler")


def _with(spec: ArchSpec, **attention: object) -> ArchSpec:
    layers = tuple(replace(x, attention=replace(x.attention, **attention)) for x in spec.layers)  # type: ignore[arg-type]
    return replace(spec, layers=layers)


DENSE = SPECS["dense"]
MODELS = {
    "experts": QUICKSTART,
    "dense": DENSE,
    "odd widths": replace(
        DENSE, hidden_size=52, layers=tuple(replace(x, mlp=DenseMlpSpec(90)) for x in DENSE.layers)
    ),
    "biases, no head norms": replace(
        _with(DENSE, qkv_bias=True, output_bias=True, qk_norm=False), family="qwen2"
    ),
    "three experts a token, gates as they are": replace(
        QUICKSTART,
        layers=tuple(
            replace(x, mlp=replace(x.mlp, top_k=3, norm_topk_prob=False)) for x in QUICKSTART.layers
        ),
    ),
}


@pytest.fixture(scope="module")
def kernel() -> Path:
    assert COMPILER is not None
    return decoding.library(COMPILER.path)


@pytest.fixture(scope="module")
def exact() -> CompiledExactNumerics:
    assert COMPILER is not None
    return CompiledExactNumerics(Library(build.library(COMPILER.path)))


@pytest.mark.parametrize("name", MODELS)
def test_no_log_prob_differs(name: str, exact: CompiledExactNumerics, kernel: Path) -> None:
    sides = Sides(MODELS[name], exact, decode_library=kernel)
    for parameter in (p for n, p in sides.trainer.decoder.named_parameters() if n.endswith("bias")):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    wrong, compared = sides.differing(replace(MIXED, group=3, slots=7))
    assert compared > 200 and wrong == 0


@pytest.mark.parametrize("case", CASES)
def test_neither_batch_nor_order_nor_sharing_shows_in_the_bits(
    case: str, exact: CompiledExactNumerics, kernel: Path
) -> None:
    wrong, compared = Sides(QUICKSTART, exact, decode_library=kernel).differing(CASES[case])
    assert compared > 100 and wrong == 0


@pytest.mark.parametrize("slots", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 17, 64, 256])
def test_1024_tokens_in_batches_of_any_size(slots: int, exact: CompiledExactNumerics, kernel: Path) -> None:
    traffic = Traffic((4, 9, 2, 17, 30, 1) * 6, (8,) * 36, 8, slots, 512, slots, 1 + slots // 3)
    wrong, compared = Sides(QUICKSTART, exact, decode_library=kernel).differing(traffic)
    assert compared >= 1024 and wrong == 0


def test_long_sequences(exact: CompiledExactNumerics, kernel: Path) -> None:
    """Prompts that are shared beyond what torch's exact numerics share, and one of a thousand tokens."""
    sides = Sides(QUICKSTART, exact, decode_library=kernel)
    for traffic in (
        Traffic((150, 40), (30, 140), group=3),
        Traffic((1000, 40), (12, 20), slots=2, micro_batch=2),
    ):
        wrong, compared = sides.differing(traffic)
        assert compared >= 32 and wrong == 0, traffic


def test_without_replay_the_trainer_decides_as_the_kernel(exact: CompiledExactNumerics, kernel: Path) -> None:
    sides = Sides(QUICKSTART, exact, decode_library=kernel)
    sides.settings = replace(sides.settings, replay_routes=False)
    wrong, compared = sides.differing(MIXED)
    assert compared > 100 and wrong == 0


def test_top_p_is_drawn_beside_the_kernel_with_its_log_probs(
    exact: CompiledExactNumerics, kernel: Path
) -> None:
    wrong, compared = Sides(QUICKSTART, exact, decode_library=kernel).differing(replace(MIXED, top_p=0.9))
    assert compared > 100 and wrong == 0


def test_steps_report_a_gap_of_exactly_zero(exact: CompiledExactNumerics, kernel: Path) -> None:
    sides = Sides(QUICKSTART, exact, decode_library=kernel)
    for _ in range(3):
        result = sides.trainer.train_step(sides.roll_out(replace(MIXED, group=4, slots=5)))
        assert result.metrics["train/train_rollout_logprob_abs_diff_max"] == 0.0
        assert result.metrics["train/grad_norm"] > 0


def test_fast_kernels_on_one_side_differ(exact: CompiledExactNumerics, kernel: Path) -> None:
    """The comparison can fail."""
    wrong, compared = Sides(QUICKSTART, exact, trainer_numerics=FAST, decode_library=kernel).differing(MIXED)
    assert wrong > compared / 2


class _RoundedActivation(CompiledExactNumerics):
    """One operation of the trainer otherwise: the gate, where it is read, half an ulp up or down."""

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return FAST.swiglu(gate_up)


def test_one_other_operation_is_seen_and_found(exact: CompiledExactNumerics, kernel: Path) -> None:
    """A trainer with torch's gated activation: some log-prob differs, and the stages name its block."""
    sides = Sides(DENSE, exact, trainer_numerics=_RoundedActivation(exact._library), decode_library=kernel)
    wrong, _ = sides.differing(MIXED)
    assert wrong > 0
    batch = sides.roll_out(MIXED)
    assert sides.engine is not None
    micro_batch = make_micro_batch(batch, torch.tensor([0]).numpy(), sides.trainer.device)
    with torch.no_grad(), hidden_states(sides.trainer.decoder) as seen:
        forward(sides.trainer.decoder, micro_batch, make_router(micro_batch, replay=False), 1.0, False)
    found = sides.engine.rescore(micro_batch.tokens_T.tolist(), 1)
    assert list(found) == stage_names(2)
    difference = first_difference(joined(seen), found)
    assert difference is not None and difference.stage == "layer 0 mlp"
