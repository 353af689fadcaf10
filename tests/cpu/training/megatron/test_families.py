"""Families with sigmoid routers, shared experts and MTP layers, and with windows and soft caps, in Megatron's
form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.algorithms.losses import PolicyLossSettings
from miles.arch import ArchSpec, load_spec, optional_copies, spec_from_hf_config
from miles.arch.precision import NumberFormat, precision_policy
from miles.data.batch import TrainBatch
from miles.errors import CheckpointError, RunError
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.training.megatron.layout import MegatronLayout
from miles.training.megatron.torch_dist import hf_to_torch_dist, torch_dist_to_hf
from miles.training.megatron.trainer import MegatronTrainer
from miles.training.native.trainer import NativeTrainer
from miles.training.settings import AlgorithmSettings, OptimizerSettings, TrainerSettings
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import to_published
from tests.cpu.training.megatron.test_model import BASE

SIZES = BASE | {"num_hidden_layers": 2, "max_position_embeddings": 64}
SHARED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "glm4_moe": {"architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "use_qk_norm": True}
    | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    | SHARED,
    "deepseek_v3": {"architectures": ["DeepseekV3ForCausalLM"], "num_key_value_heads": 4, "q_lora_rank": 12}
    | {"kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 6}
    | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    | SHARED,
    "deepseek_v32": {"architectures": ["DeepseekV32ForCausalLM"], "num_key_value_heads": 4, "q_lora_rank": 12}
    | {"kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 6}
    | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 13}
    | SHARED,
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["sliding_attention", "full_attention"]}
    | {"sliding_window": 4, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}
    | {"query_pre_attn_scalar": 7},
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], "sliding_window": 4, "sliding_window_pattern": 2}
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 100.0}
    | {"query_pre_attn_scalar": 11},
    "llama4_text": {"architectures": ["Llama4ForCausalLM"], "no_rope_layers": [1, 0], "moe_layers": [1]}
    | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 12, "intermediate_size_mlp": 28}
    | {"attention_chunk_size": 4, "floor_scale": 4, "attn_scale": 0.3},
    "minimax_m2": {"architectures": ["MiniMaxM2ForCausalLM"], "num_local_experts": 4, "rotary_dim": 4}
    | {"num_experts_per_tok": 2, "intermediate_size": 12},
}
STACKED = "llama4_text"
"""Its experts are one published tensor, of which ETP cuts another dimension than EP."""


def family_spec(name: str, **more: Any) -> ArchSpec:
    return spec_from_hf_config(SIZES | FAMILIES[name] | more)


def settings_of(spec: ArchSpec) -> TrainerSettings:
    return TrainerSettings(
        optimizer=OptimizerSettings(lr=2e-3),
        max_tokens_per_micro_batch=40,
        train_mtp=spec.mtp is not None,
        algorithm=AlgorithmSettings(policy=PolicyLossSettings(entropy_coef=0.01), temperature=0.7),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_two_steps_equal_the_native_trainers(name: str, make_batch: Callable[..., TrainBatch]) -> None:
    spec = family_spec(name)
    trainers = [kind(spec, settings_of(spec)) for kind in (MegatronTrainer, NativeTrainer)]
    for trainer in trainers:
        trainer.init_weights(0)
    for seed in range(2):
        batch = make_batch(spec, seed=seed, noise=0.3)
        ours, theirs = (
            {k: v for k, v in t.train_step(batch).metrics.items() if "perf/" not in k} for t in trainers
        )
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    expected = dict(trainers[1].named_weights())
    for key, tensor in trainers[0].named_weights():
        assert (tensor - expected[key]).abs().mean() <= 1e-5, key


def test_stacked_experts_in_int4_equal_the_native_trainers(make_batch: Callable[..., TrainBatch]) -> None:
    spec, int4 = family_spec(STACKED), NumberFormat("int4", group_size=4)
    settings = replace(settings_of(spec), precision=precision_policy(spec, "fp32", int4, int4))
    trainers = [kind(spec, settings) for kind in (MegatronTrainer, NativeTrainer)]
    batch, steps = make_batch(spec, noise=0.3), []
    for trainer in trainers:
        trainer.init_weights(0)
        steps.append(trainer.train_step(batch).metrics)
    ours, theirs = ({k: v for k, v in step.items() if "perf/" not in k} for step in steps)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert ours["precision/weight_error/layer_1"] > 0


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3", "deepseek_v32"])
@pytest.mark.parametrize(
    "again", [{"recompute_num_layers": 2}, {"recompute_modules": frozenset({"core_attn", "mlp"})}]
)
def test_layers_with_windows_or_an_indexer_run_again_in_backward(
    again: dict[str, Any], name: str, make_batch: Callable[..., TrainBatch]
) -> None:
    spec = family_spec(name)
    batch, norms = make_batch(spec, noise=0.3), []
    for more in ({}, again):
        trainer = MegatronTrainer(spec, replace(settings_of(spec), **more))
        trainer.init_weights(0)
        norms.append(trainer.train_step(batch).metrics["train/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    "dist_checkpoints", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["by name", "torch_dist"]
)
def test_indexers_stay_as_published_and_a_run_goes_on_bit_for_bit(
    dist_checkpoints: bool, tmp_path: Path, make_batch: Callable[..., TrainBatch]
) -> None:
    """In bf16; that of the MTP layer too, which is trained along."""
    spec = family_spec("deepseek_v32")
    first, second = (make_batch(spec, seed=seed, noise=0.3) for seed in range(2))
    settings = replace(settings_of(spec), optimizer=OptimizerSettings(lr=2e-3, weight_decay=0.5))

    def trainer() -> MegatronTrainer:
        return MegatronTrainer(spec, settings, dtype=torch.bfloat16, dist_checkpoints=dist_checkpoints)

    def weights() -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in whole.named_weights()}

    whole = trainer()
    whole.init_weights(0)
    before = weights()
    whole.train_step(first)
    whole.save(tmp_path)
    whole.train_step(second)
    after = weights()
    indexers = [key for key in after if ".indexer." in key]
    assert len(indexers) == 5 * (spec.num_layers + spec.mtp_num_layers)
    assert all(torch.equal(after[key], before[key]) for key in indexers)
    assert not torch.equal(after["model.layers.2.eh_proj.weight"], before["model.layers.2.eh_proj.weight"])

    whole = trainer()
    whole.init_weights(1)
    whole.load(tmp_path)
    whole.train_step(second)
    assert [key for key, tensor in weights().items() if not torch.equal(tensor, after[key])] == []


def test_under_an_indexer_an_mtp_layer_does_not_go_on_from_its_guesses(
    make_batch: Callable[..., TrainBatch],
) -> None:
    """SPC8."""
    spec = family_spec("deepseek_v32")
    trainer = MegatronTrainer(spec, replace(settings_of(spec), mtp_training_steps=2))
    trainer.init_weights(0)
    with pytest.raises(RunError, match="indexer") as refused:
        trainer.train_step(make_batch(spec))
    assert "--mtp-training-steps 1" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_to_torch_dist_and_back(name: str, tmp_path: Path) -> None:
    """Bit for bit, the numbers that arithmetic would change and the MTP layers included."""
    spec = family_spec(name, torch_dtype="bfloat16")
    decoder = Decoder(spec, dtype=torch.bfloat16)
    draft = None if spec.mtp is None else MtpDraft(spec, dtype=torch.bfloat16)
    tensors = {key: view.clone() for key, view in to_published(decoder, draft)}
    for seed, tensor in enumerate(tensors.values()):
        tensor.normal_(generator=torch.Generator().manual_seed(seed))
        tensor.view(-1)[:3] = torch.tensor([-0.0, float("inf"), 1e-40])
    copies = optional_copies(spec)
    tensors |= {key: tensors[copies[key]] for key in tensors if key in copies}
    names = set(tensors)
    write_hf(tmp_path / "hf", spec, tensors.items())
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "torch_dist")
    torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "back")
    given, found = dict(read_hf(tmp_path / "hf")), dict(read_hf(tmp_path / "back"))
    assert given.keys() == found.keys() == names
    for key, tensor in given.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert load_spec(tmp_path / "back") == spec


@pytest.mark.slow
def test_a_tower_beside_the_language_model_is_taken_from_where_it_was(tmp_path: Path) -> None:
    """Megatron holds the language model alone."""
    pytest.importorskip("transformers")
    from tests.cpu.families.tiny_checkpoints import CASES

    CASES["gemma3"].save(tmp_path / "hf")
    hf_to_torch_dist(tmp_path / "hf", tmp_path / "torch_dist")
    with pytest.raises(CheckpointError, match=r"not vision_tower.*, multi_modal_projector"):
        torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "back")
    torch_dist_to_hf(tmp_path / "torch_dist", tmp_path / "back", tmp_path / "hf")
    given, found = dict(read_hf(tmp_path / "hf")), dict(read_hf(tmp_path / "back"))
    assert given.keys() == found.keys() and any(name.startswith("vision_tower.") for name in given)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


LAYOUTS = {
    "TP2 with sequence parallelism and EP2": MegatronLayout(tp=2, ep=2, sequence_parallel=True),
    "PP2": MegatronLayout(pp=2),
    "TP2 with sequence parallelism and ETP2": MegatronLayout(tp=2, etp=2, sequence_parallel=True),
}
CUTS = [(name, kind) for name in FAMILIES for kind in LAYOUTS if "ETP2" not in kind or name == STACKED]


@pytest.fixture(scope="module")
def outcomes(
    world: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, make_batches: Any
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("families")
    how = {
        name: {"spec": spec, "settings": settings_of(spec), "batches": make_batches(spec, 3)}
        for name, spec in ((name, family_spec(name)) for name in FAMILIES)
    }
    cases = {f"{name}, {kind}": ("train", how[name] | {"layout": LAYOUTS[kind]}) for name, kind in CUTS}
    saved, indexed = root / "saved", how["deepseek_v32"]
    saved.mkdir()
    first, other = (LAYOUTS[kind] for kind in ("TP2 with sequence parallelism and EP2", "PP2"))
    cases["saved"] = ("train", indexed | {"layout": first, "save": saved, "dist_checkpoints": True})
    cases["loaded"] = ("go_on", indexed | {"layout": other, "load": saved, "batches": []})
    alone = {name: ("train", how[name] | {"layout": MegatronLayout()}) for name in FAMILIES}
    two: dict[str, Any] = world(2, root / "two", cases)[0]
    one: dict[str, Any] = world(1, root / "one", alone)[0]
    return two | one


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), CUTS)
def test_two_processes_equal_one(name: str, layout: str, outcomes: dict[str, Any]) -> None:
    rows, weights = outcomes[f"{name}, {layout}"]
    expected, alone = outcomes[name]
    for row, right in zip(rows, expected, strict=True):
        assert row == pytest.approx(right, rel=1e-3, abs=1e-4)
    for key, tensor in weights.items():
        assert (tensor - alone[key]).abs().mean() <= 1e-5, key


@pytest.mark.slow
def test_a_torch_dist_checkpoint_with_indexers_is_read_in_another_layout(outcomes: dict[str, Any]) -> None:
    (_, written), (_, read, _) = outcomes["saved"], outcomes["loaded"]
    assert any(".indexer." in key for key in read)
    assert all(torch.equal(tensor, written[key]) for key, tensor in read.items())
