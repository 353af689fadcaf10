"""Native parameters under published names: complete, without copies, and in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from miles.arch import published_tensors, with_mtp
from miles.arch.families import FAMILIES
from miles.arch.family import MtpNames
from miles.errors import CheckpointError
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.weights.native_map import (
    load_published,
    load_views,
    published_views,
    tensor_groups,
    to_published,
    without_spare_mtp,
)


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_the_published_ones(make_decoder: Callable, tied: bool) -> None:
    decoder = make_decoder(tie_word_embeddings=tied)
    shapes = {name: tuple(tensor.shape) for name, tensor in to_published(decoder)}
    assert shapes == published_tensors(decoder.spec)


def test_published_tensors_cover_every_parameter_once_without_a_copy(make_decoder: Callable) -> None:
    decoder = make_decoder()
    for _, view in to_published(decoder):
        view.add_(1000)
    for name, parameter in decoder.named_parameters():
        assert ((parameter > 900) & (parameter < 1100)).all(), name


def test_fused_parameters_hold_their_parts_in_order(make_decoder: Callable) -> None:
    decoder = make_decoder()
    published = dict(to_published(decoder))
    attention, experts = decoder.layers[1].attention, decoder.layers[1].mlp
    assert torch.equal(published["model.layers.1.self_attn.k_proj.weight"], attention.qkv[16:24])
    assert torch.equal(published["model.layers.1.self_attn.v_proj.bias"], attention.qkv_bias[24:32])
    assert torch.equal(published["model.layers.1.mlp.experts.2.gate_proj.weight"], experts.gate_up[2, :6])
    assert torch.equal(published["model.layers.1.mlp.experts.2.up_proj.weight"], experts.gate_up[2, 6:])
    assert torch.equal(published["model.layers.0.mlp.up_proj.weight"], decoder.layers[0].mlp.gate_up[14:])


def test_weights_survive_the_way_out_and_in_whatever_the_order(make_decoder: Callable) -> None:
    source, target = make_decoder(seed=1), make_decoder(seed=2)
    load_published(target, reversed(list(to_published(source))))
    for name, parameter in source.named_parameters():
        assert torch.equal(parameter, target.get_parameter(name)), name


def test_loading_converts_to_the_decoders_dtype(make_decoder: Callable) -> None:
    source, target = make_decoder(seed=1), make_decoder(seed=2, dtype=torch.bfloat16)
    load_published(target, to_published(source))
    assert torch.equal(source.embed.bfloat16(), target.embed)


def test_moments_travel_under_the_same_names(make_decoder: Callable) -> None:
    decoder = make_decoder()
    moments = {name: torch.randn_like(parameter) for name, parameter in decoder.named_parameters()}
    restored = {name: torch.empty_like(moment) for name, moment in moments.items()}
    load_views(decoder.spec, restored, list(published_views(decoder.spec, moments)), where="moments")
    for name, moment in moments.items():
        assert torch.equal(restored[name], moment), name


def test_missing_unexpected_misshapen_and_repeated_tensors_are_refused_by_name(
    make_decoder: Callable,
) -> None:
    decoder = make_decoder()
    items = dict(to_published(decoder))
    with pytest.raises(CheckpointError, match=r"missing \(1\): model.norm.weight"):
        load_published(decoder, [(n, t) for n, t in items.items() if n != "model.norm.weight"])
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): model.extra"):
        load_published(decoder, [*items.items(), ("model.extra", torch.zeros(1))])
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \[18, 10\], config.json gives \[19, 10\]"):
        load_published(decoder, (items | {"lm_head.weight": torch.zeros(18, 10)}).items())
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight comes twice"):
        load_published(decoder, [*items.items(), ("model.norm.weight", torch.zeros(10))])


def test_a_tied_model_takes_a_second_head_only_if_it_equals_the_embedding(make_decoder: Callable) -> None:
    decoder = make_decoder(tie_word_embeddings=True)
    items = dict(to_published(decoder))
    load_published(decoder, [("lm_head.weight", decoder.embed.detach().clone()), *items.items()])
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_published(decoder, [("lm_head.weight", torch.zeros(19, 10)), *items.items()])


def test_a_group_is_one_native_parameter_under_published_names(make_decoder: Callable) -> None:
    decoder = make_decoder()
    groups = list(tensor_groups(decoder))
    assert len(groups) == len(list(decoder.parameters()))
    assert sum(group.nbytes for group in groups) == sum(p.nbytes for p in decoder.parameters())
    assert {group.component for group in groups} == {"policy"}
    names = [group.names for group in groups]
    assert tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv") in names
    assert tuple(f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(3)) in names


@pytest.fixture
def make_pair(make_decoder: Callable) -> Callable[..., tuple[Decoder, MtpDraft]]:
    """A decoder and MTP layers, every element a different number."""

    def make(seed: int = 0, depth: int = 2) -> tuple[Decoder, MtpDraft]:
        decoder = make_decoder(seed)
        draft = MtpDraft(with_mtp(decoder.spec, depth))
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(seed + parameter.numel()))
        return decoder, draft

    return make


def test_mtp_layers_have_the_published_names_of_their_family(make_pair: Callable) -> None:
    decoder, draft = make_pair()
    shapes = {name: tuple(tensor.shape) for name, tensor in to_published(decoder, draft)}
    assert shapes == published_tensors(draft.spec)
    own = set(shapes) - set(published_tensors(decoder.spec))
    assert all(name.startswith("mtp.") for name in own)
    assert shapes["mtp.fc.weight"] == (10, 20)
    assert {"mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight", "mtp.norm.weight"} < own
    assert "mtp.layers.1.mlp.experts.2.down_proj.weight" in own


def test_another_familys_names_are_a_row_of_its_table(make_pair: Callable, monkeypatch) -> None:
    """DeepSeek-V3 publishes each MTP layer as a decoder layer behind the last, with its own projection."""
    deepseek = MtpNames(
        layer="model.layers.{layer}",
        embedding_norm="model.layers.{layer}.enorm.weight",
        hidden_norm="model.layers.{layer}.hnorm.weight",
        fc="model.layers.{layer}.eh_proj.weight",
        final_norm="model.layers.{layer}.shared_head.norm.weight",
    )
    own = replace(FAMILIES["qwen3_moe"], mtp_names=deepseek, shared_mtp_projection=False)
    monkeypatch.setitem(FAMILIES, "qwen3_moe", own)
    decoder, draft = make_pair(depth=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in to_published(decoder, draft)}
    assert shapes == published_tensors(draft.spec)
    assert shapes["model.layers.2.eh_proj.weight"] == shapes["model.layers.3.eh_proj.weight"] == (10, 20)
    assert "model.layers.3.self_attn.q_proj.weight" in shapes


def test_policy_and_draft_survive_the_way_out_and_in_together(make_pair: Callable) -> None:
    (decoder, draft), (other, other_draft) = make_pair(1), make_pair(2)
    load_published(other, reversed(list(to_published(decoder, draft))), draft=other_draft)
    for ours, theirs in ((decoder, other), (draft, other_draft)):
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(name)), name


def test_groups_say_which_component_they_belong_to(make_pair: Callable) -> None:
    decoder, draft = make_pair()
    components = {name: group.component for group in tensor_groups(decoder, draft) for name in group.names}
    assert components["model.embed_tokens.weight"] == "policy"
    assert components["mtp.fc.weight"] == components["mtp.layers.0.mlp.gate.weight"] == "draft"


def test_a_draft_is_neither_lost_nor_slipped_in_silently(make_pair: Callable) -> None:
    decoder, draft = make_pair()
    with pytest.raises(CheckpointError, match=r"unexpected \(48\): mtp\.pre_fc_norm_embedding\.weight"):
        load_published(decoder, to_published(decoder, draft))
    with pytest.raises(CheckpointError, match=r"missing \(48\): mtp\.fc\.weight"):
        load_published(decoder, to_published(decoder), draft=draft)
    kept = list(without_spare_mtp(draft.spec, decoder.spec, to_published(decoder, draft)))
    load_published(decoder, kept)
    one = with_mtp(decoder.spec, 1)
    names = {name for name, _ in without_spare_mtp(draft.spec, one, to_published(decoder, draft))}
    assert names == set(published_tensors(one))
