"""One object says how every published tensor is stored and computed with, exceptions included."""

from __future__ import annotations

from typing import get_args

import pytest

from miles.arch import published_tensors, with_mtp
from miles.arch.families import FAMILIES
from miles.arch.precision import FormatName, NumberFormat, PrecisionPolicy, precision_policy
from miles.arch.specs import shipped_names, shipped_spec
from miles.arch.tensor_roles import decoder_layer, is_fp32_buffer, role_of

LAYER = "model.layers.3"
ROLES = {
    "model.embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "model.norm.weight": "norm",
    f"{LAYER}.input_layernorm.weight": "norm",
    f"{LAYER}.self_attn.q_norm.weight": "norm",
    f"{LAYER}.self_attn.kv_a_layernorm.weight": "norm",
    f"{LAYER}.self_attn.q_proj.weight": "attention",
    f"{LAYER}.self_attn.q_proj.bias": "bias",
    f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight": "attention",
    f"{LAYER}.self_attn.indexer.wq_b.weight": "attention",
    f"{LAYER}.self_attn.indexer.weights_proj.weight": "router",
    f"{LAYER}.mlp.gate.weight": "router",
    f"{LAYER}.mlp.gate.e_score_correction_bias": "bias",
    f"{LAYER}.mlp.gate_proj.weight": "mlp",
    f"{LAYER}.mlp.experts.7.down_proj.weight": "expert",
    f"{LAYER}.block_sparse_moe.gate.weight": "router",
    f"{LAYER}.block_sparse_moe.experts.7.w1.weight": "expert",
    f"{LAYER}.mlp.shared_experts.up_proj.weight": "shared expert",
    f"{LAYER}.feed_forward.router.weight": "router",
    f"{LAYER}.feed_forward.experts.gate_up_proj": "expert",
    "model.layers.61.eh_proj.weight": "MTP projection",
    "model.layers.61.enorm.weight": "norm",
    "model.layers.61.shared_head.head.weight": "head",
    "mtp.fc.weight": "MTP projection",
    "mtp.pre_fc_norm_hidden.weight": "norm",
    "mtp.layers.0.mlp.experts.7.up_proj.weight": "expert",
}


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_a_name_tells_the_role(name: str, role: str) -> None:
    assert role_of(name) == role


@pytest.mark.parametrize("model", shipped_names())
def test_every_tensor_of_every_shipped_model_has_a_role(model: str) -> None:
    spec = shipped_spec(model)
    names = published_tensors(with_mtp(spec, 1) if FAMILIES[spec.family].takes_mtp else spec)
    assert [name for name in names if role_of(name) == "other"] == []


def stored(policy: PrecisionPolicy) -> set[str]:
    """Names of `ROLES` that the policy quantises."""
    return {name for name in ROLES if not policy.storage(name).is_plain}


def by_role(*roles: str) -> set[str]:
    return {name for name, role in ROLES.items() if role in roles}


def test_eight_bits_take_all_projections_and_four_bits_the_experts() -> None:
    projections = by_role("attention", "mlp", "expert", "shared expert")
    for name in ("fp8", "fp8_channel", "fp8_tensor", "mxfp8", "int8"):
        assert stored(PrecisionPolicy(NumberFormat(name))) == projections  # type: ignore[arg-type]
    for name in ("int4", "nvfp4"):
        assert stored(PrecisionPolicy(NumberFormat(name))) == by_role("expert")  # type: ignore[arg-type]
        dense = PrecisionPolicy(NumberFormat(name), is_moe=False)  # type: ignore[arg-type]
        assert stored(dense) == projections, "a dense model has no experts to take"


def test_a_plain_format_takes_every_tensor_and_a_quantised_one_leaves_the_rest_to_the_trainers() -> None:
    plain = PrecisionPolicy(NumberFormat("bf16"))
    assert {plain.storage(name).name for name in ROLES if not is_fp32_buffer(name)} == {"bf16"}
    assert plain.storage(f"{LAYER}.mlp.gate.e_score_correction_bias").name == "fp32"
    mixed = PrecisionPolicy(NumberFormat("fp8"), plain="bf16")
    assert mixed.storage("lm_head.weight").name == "bf16"


def test_exceptions_by_layer_count_decoder_layers_from_both_ends() -> None:
    spec = shipped_spec("qwen3-30b-a3b")
    policy = precision_policy(spec, "bf16", NumberFormat("fp8"), first_layers=1, last_layers=2)
    name = "model.layers.{}.self_attn.q_proj.weight"
    plain = [i for i in range(spec.num_layers) if policy.storage(name.format(i)).is_plain]
    assert plain == [0, 46, 47]
    assert not policy.storage(name.format(48)).is_plain, "an MTP layer after the decoder's is none of them"
    assert not policy.storage("mtp.layers.0.self_attn.q_proj.weight").is_plain
    assert decoder_layer("mtp.layers.0.self_attn.q_proj.weight") is None
    assert policy.of(name.format(0)).reason == "in the first 1 layers"
    assert policy.of(name.format(47)).reason == "in the last 2 layers"


def test_exceptions_by_name_hold_on_both_sides() -> None:
    fp8 = NumberFormat("fp8", "pow2")
    policy = PrecisionPolicy(fp8, fp8, "bf16", kept=("shared_experts",))
    shared = policy.of(f"{LAYER}.mlp.shared_experts.up_proj.weight")
    assert (shared.storage.name, shared.compute.name) == ("bf16", "bf16")
    assert shared.reason == "name has shared_experts"
    expert = policy.of(f"{LAYER}.mlp.experts.0.up_proj.weight")
    assert (expert.storage, expert.compute, expert.reason) == (fp8, fp8, "expert is quantised")
    assert policy.of("lm_head.weight").reason == "head is kept"


def test_a_format_tells_its_conventions() -> None:
    assert str(NumberFormat("fp8", "pow2")) == "fp8 (128x128, pow2 scales)"
    assert str(NumberFormat("int4", group_size=128)) == "int4 (1x128, bf16 scales, symmetric)"
    assert str(NumberFormat("bf16")) == "bf16"
    assert all(str(NumberFormat(name)) for name in get_args(FormatName))
