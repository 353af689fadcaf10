"""Trainer and engine of one precision policy multiply the same numbers, so that rounding makes no gap."""

from __future__ import annotations

import asyncio

import pytest
import torch
from low_precision_support import GAP, Pair, latent_spec, stacked_spec, wide_spec

from miles.arch.precision import NumberFormat, precision_policy
from miles.errors import CheckpointError, ConfigError
from miles.models.decoder import Decoder
from miles.models.experts import ExpertKernels, routed_experts
from miles.models.invariance import find_exact_numerics
from miles.models.projections import Projections
from miles.precision.fp8_block import ACTIVATIONS, fake_quantise
from miles.precision.mxfp8 import Mxfp8
from miles.precision.rounding_sums import rounding_sums, shares
from miles.precision.weight_format import dequantised, quantised
from miles.weights.low_precision import as_stored
from miles.weights.low_precision import fake_quantise as round_decoder

FP32, BF16, FP8, POW2 = (
    NumberFormat("fp32"),
    NumberFormat("bf16"),
    NumberFormat("fp8"),
    NumberFormat("fp8", "pow2"),
)
FORMATS = {
    "fp8": FP8,
    "fp8-pow2": POW2,
    "mxfp8": NumberFormat("mxfp8"),
    "int4": NumberFormat("int4"),
}
STORED_AS = {
    "fp8": {torch.float8_e4m3fn, torch.float32},
    "fp8-pow2": {torch.float8_e4m3fn, torch.float32},
    "mxfp8": {torch.float8_e4m3fn, torch.uint8},
    "int4": {torch.int32, torch.bfloat16},
}


def blocks(decoder: Decoder) -> list[Projections]:
    return [block for block in decoder.modules() if isinstance(block, Projections)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FORMATS)
def test_both_sides_multiply_the_same_numbers_and_the_engine_holds_few_bits(
    name: str, dtype: torch.dtype
) -> None:
    pair = Pair(FORMATS[name], FORMATS[name], dtype)
    rounded = 0
    for ours, theirs in zip(blocks(pair.trainer.decoder), blocks(pair.engine.decoder), strict=True):
        assert ours.operands.keys() == theirs.operands.keys()
        for matrix in ours.operands:
            assert torch.equal(ours.matrix(matrix), theirs.matrix(matrix)), matrix
            assert not torch.equal(ours.matrix(matrix), getattr(ours, matrix)), "it is rounded"
            assert getattr(theirs, matrix) is None, "the engine keeps no plain weights"
            x = torch.randn(3, ours.matrix(matrix).shape[-1], dtype=dtype)
            assert torch.equal(ours.rounded(matrix, x), theirs.rounded(matrix, x))
            assert torch.equal(ours.rounded(matrix, x), x) == (name == "int4"), "W4A16 keeps activations"
            rounded += 1
    assert rounded == (4 if name == "int4" else 12), "INT4 takes the experts alone"
    held = pair.engine.held
    assert held is not None and held.dtypes == STORED_AS[name]
    plain = {n for n, _ in pair.trainer.named_weights() if pair.policy.storage(n).is_plain}
    sent = as_stored(pair.trainer.named_weights(), pair.policy)
    parts = {n: tensor for n, tensor in sent if n not in plain and not n.endswith("_shape")}
    assert held.nbytes == sum(tensor.nbytes for tensor in parts.values())


def test_gradients_pass_through_the_rounding_of_weights() -> None:
    pair = Pair(FP8, FP8)
    block = pair.trainer.decoder.layers[1].mlp
    direction = torch.randn_like(block.gate_up)
    (block.matrix("gate_up") * direction).sum().backward()
    assert torch.equal(block.gate_up.grad, direction)


def test_experts_with_rounded_operands_have_the_gradients_of_autograd() -> None:
    torch.manual_seed(0)
    x, ids = torch.randn(6, 20, requires_grad=True), torch.tensor([[0, 1], [1, 2]] * 3)
    weights = torch.rand(6, 2, requires_grad=True)
    gate_up, down = torch.randn(3, 32, 20, requires_grad=True), torch.randn(3, 20, 16, requires_grad=True)
    inputs = (x, weights, gate_up, down)

    def rounded(active: torch.Tensor) -> torch.Tensor:
        return fake_quantise(active, block=ACTIVATIONS)

    def one_by_one() -> torch.Tensor:
        rows = []
        for t in range(6):
            parts = []
            for slot, expert in enumerate(ids[t]):
                gate, up = (gate_up[expert] @ x[t]).chunk(2)
                active = rounded((torch.nn.functional.silu(gate) * up)[None])[0]
                parts.append(weights[t, slot] * (down[expert] @ active))
            rows.append(sum(parts))
        return torch.stack(rows)  # type: ignore[arg-type]

    ours = routed_experts(x, ids, weights, gate_up, down, ExpertKernels(rounded=rounded))
    direction = torch.randn_like(ours)
    wanted = torch.autograd.grad((one_by_one() * direction).sum(), inputs)
    found = torch.autograd.grad((ours * direction).sum(), inputs)
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_latent_attention_and_shared_experts_are_rounded_alike(name: str) -> None:
    form = FORMATS[name]
    pair, mixed = Pair(form, form, spec=latent_spec()), Pair(FP32, form, spec=latent_spec())
    assert pair.gap() < 0.1 * mixed.gap()
    matrices = {name for block in blocks(pair.trainer.decoder) for name in block.operands}
    attention = set() if name == "int4" else {"down", "q", "kv_up", "o", "k"}
    assert matrices == {"gate_up", "down"} | attention


@pytest.mark.parametrize("name", FORMATS)
def test_stacked_experts_are_rounded_and_sent_one_by_one(name: str) -> None:
    pair = Pair(FORMATS[name], FORMATS[name], spec=stacked_spec())
    ours, theirs = (side.decoder.layers[1].mlp for side in (pair.trainer, pair.engine))
    published = dict(pair.trainer.named_weights())["model.layers.1.feed_forward.experts.gate_up_proj"]
    assert published.shape == (4, 320, 192), "the trainer's checkpoints are as published"
    gate = quantised(FORMATS[name], published[2, :, :96].T.contiguous())
    assert torch.equal(ours.matrix("gate_up")[2, :96], dequantised(gate))
    for matrix in ("gate_up", "down"):
        assert torch.equal(ours.matrix(matrix), theirs.matrix(matrix)), matrix
    assert torch.equal(ours.router, theirs.router)
    before, batch = ours.down.detach().clone(), pair._rollout(8, 8)
    result = pair.trainer.train_step(batch)
    assert not result.events and result.metrics[GAP] < 2e-3
    assert not torch.equal(before, ours.down), "the gradient arrives at the stack"


def test_fp8_on_both_sides_leaves_a_tenth_of_the_gap_and_a_wrong_scale_brings_it_back() -> None:
    """In fast numerics the sides differ by the order of sums, which flips a rounding here and there."""
    mixed, both, wrong = (Pair(t, r).gap(24) for t, r in ((FP32, FP8), (FP8, FP8), (FP8, POW2)))
    assert both <= mixed / 10
    assert wrong >= 10 * both


def test_in_bf16_steps_of_decode_and_long_segments_leave_a_tenth_of_the_gap_as_well() -> None:
    """A bf16 number that differs by its last bit falls into another step of FP8 every now and then."""
    mixed, both = (Pair(training, FP8, torch.bfloat16).gap(6, 36) for training in (BF16, FP8))
    assert both <= mixed / 10


def test_int4_on_both_sides_leaves_no_gap_beyond_the_order_of_sums() -> None:
    int4 = FORMATS["int4"]
    assert Pair(int4, int4).gap() < 2e-6 < 1e-3 < Pair(FP32, int4).gap()


@pytest.mark.slow
def test_in_exact_numerics_bf16_with_fp8_on_both_sides_has_no_gap_at_all() -> None:
    exact = find_exact_numerics(wide_spec(), torch.bfloat16)
    pairs = ((BF16, FP8), (FP8, FP8), (FP8, POW2))
    mixed, both, wrong = (Pair(*formats, torch.bfloat16, exact).gap(6, 12) for formats in pairs)
    assert both == 0 and mixed > 0.01 and wrong > 0.01


def test_a_weight_that_comes_in_another_form_or_not_whole_is_refused_by_name() -> None:
    pair = Pair(FP8, FP8)
    sent = dict(as_stored(pair.trainer.named_weights(), pair.policy))
    name = "model.layers.0.self_attn.q_proj.weight"

    def receive(items: dict[str, torch.Tensor]) -> None:
        asyncio.run(pair.engine.receive_weights(items.items(), 2))

    with pytest.raises(CheckpointError, match=f"{name} came without {name}_scale_inv"):
        receive({key: tensor for key, tensor in sent.items() if key != f"{name}_scale_inv"})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is torch\.float32"):
        receive(sent | {name: torch.zeros(320, 320)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        receive({key: tensor for key, tensor in sent.items() if key != "model.norm.weight"})
    assert not pair.engine.health().ok
    receive(sent)
    assert pair.engine.health().ok


def test_one_product_in_two_formats_is_refused() -> None:
    spec = wide_spec()
    kept = ("q_proj",)
    with pytest.raises(ConfigError, match=r"q_proj\.weight is kept plain, .*k_proj\.weight is quantised"):
        round_decoder(precision_policy(spec, "fp32", FP8, FP8, kept=kept), Decoder(spec))


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_a_step_of_training_moves_the_rounded_policy(name: str) -> None:
    pair = Pair(FORMATS[name], FORMATS[name])
    before = pair.trainer.decoder.layers[1].mlp.down.detach().clone()
    result = pair.trainer.train_step(pair._rollout(8, 8))
    assert not result.events and result.metrics["train/grad_norm"] > 0
    assert not torch.equal(before, pair.trainer.decoder.layers[1].mlp.down)


def test_the_step_reports_what_rounding_did_layer_by_layer() -> None:
    pair = Pair(FP8, FP8)
    metrics = pair.trainer.train_step(pair._rollout(8, 8)).metrics
    block = pair.trainer.decoder.layers[1].attention
    for kind in ("weight", "activation"):
        assert {f"precision/{kind}_error/layer_{layer}" for layer in range(3)} <= metrics.keys()
        assert 0.02 < metrics[f"precision/{kind}_error"] < 0.04, "three bits of mantissa"
        assert metrics[f"precision/{kind}_saturated_frac"] == 0, "scales follow the peaks"
        assert metrics[f"precision/{kind}_underflow_frac"] < 0.01
    exact, rounded = block.qkv.detach(), block.matrix("qkv").detach()
    own = float((rounded - exact).norm() / exact.norm())
    assert own == pytest.approx(metrics["precision/weight_error/layer_1"], rel=0.1)
    plain = Pair(FP32, FP32)
    assert not any(n.startswith("precision/") for n in plain.trainer.train_step(plain._rollout(8, 8)).metrics)


def test_int4_reports_the_layers_with_experts_and_no_activations() -> None:
    int4 = FORMATS["int4"]
    pair = Pair(int4, int4)
    metrics = pair.trainer.train_step(pair._rollout(8, 8)).metrics
    found = {name for name in metrics if name.startswith("precision/")}
    assert {name.rpartition("/")[2] for name in found if "layer" in name} == {"layer_1", "layer_2"}
    assert not any("activation" in name for name in found)
    assert 0.08 < metrics["precision/weight_error"] < 0.12


def test_numbers_beyond_the_format_and_lost_ones_are_counted() -> None:
    exact = torch.tensor([[448.0, 1000.0, 1e-9, 0.0] + [1.0] * 28])
    stored = Mxfp8(exact.clamp(-448, 448).to(torch.float8_e4m3fn), torch.full((1, 1), 127, dtype=torch.uint8))
    found = shares(rounding_sums(NumberFormat("mxfp8"), exact, stored))
    assert found["saturated_frac"] == 1 / 32 and found["underflow_frac"] == 1 / 31
    assert found["error"] == pytest.approx(552 / float(exact.norm()))
