"""Checkpoints of the mixture-of-experts families: bit for bit there and back, quantised, with MTP layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from family_cases import (
    ONE_OF_EACH,
    SHIPPING_MTP,
    FamilyCase,
    load_decoder,
    load_reference,
    make_reference,
    save_reference,
    sequences,
)
from torch import Tensor, nn
from transformers.modeling_layers import MtpModel

from miles.arch import ArchSpec, load_spec, optional_copies, published_tensors, with_mtp
from miles.arch.precision import FormatName, NumberFormat
from miles.arch.tensor_roles import is_fp32_buffer
from miles.errors import CheckpointError
from miles.models.attention import PackedAttention
from miles.models.decoder import Decoder
from miles.models.mtp import MtpDraft
from miles.models.routing import Router
from miles.precision.weight_format import dequantised, quantised
from miles.weights.convert import Wanted, convert, open_source, plan_conversion
from miles.weights.convert.stored import as_numbers
from miles.weights.hf import read_hf, write_hf
from miles.weights.native_map import load_published, to_published

each_family = pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=ONE_OF_EACH.keys())


def make_checkpoint(
    case: FamilyCase, directory: Path, mtp_layers: int = 0, aligned: bool = False
) -> ArchSpec:
    """A bf16 checkpoint as published: router biases in fp32, with the copies that stand beside MTP layers.

    `aligned`: widths of whole groups of INT4.
    """
    if aligned:
        wide = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32}
        case = replace(case, config=case.config | {k: v for k, v in wide.items() if k in case.config})
    save_reference(case, directory / "reference")
    spec = replace(with_mtp(load_spec(directory / "reference"), mtp_layers), dtype="bf16")
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)
        for name, shape in published_tensors(spec).items()
    }
    tensors |= {copy: tensors[original] for copy, original in optional_copies(spec).items()}
    write_hf(directory / "published", spec, tensors.items())
    return load_spec(directory / "published")


@each_family
@pytest.mark.parametrize("mtp_layers", [0, 2])
def test_a_published_checkpoint_is_written_back_bit_for_bit(
    case: FamilyCase, mtp_layers: int, tmp_path: Path
) -> None:
    spec = make_checkpoint(case, tmp_path, mtp_layers)
    decoder, draft = Decoder(spec, torch.bfloat16), MtpDraft(spec, torch.bfloat16) if mtp_layers else None
    load_published(decoder, read_hf(tmp_path / "published"), draft=draft)
    source = tmp_path / "published"
    write_hf(tmp_path / "again", spec, to_published(decoder, draft), source_dir=source)
    before, after = dict(read_hf(source)), dict(read_hf(tmp_path / "again"))
    assert before.keys() == after.keys() == {*published_tensors(spec), *optional_copies(spec)}
    for name, tensor in before.items():
        assert tensor.dtype == (torch.float32 if is_fp32_buffer(name) else torch.bfloat16), name
        assert torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype, name
    assert (tmp_path / "again" / "config.json").read_text() == (source / "config.json").read_text()


@pytest.mark.slow
@each_family
@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_quantised_checkpoint_stands_for_the_rounded_weights(
    case: FamilyCase, form: FormatName, tmp_path: Path
) -> None:
    spec = make_checkpoint(case, tmp_path, mtp_layers=1, aligned=True)
    wanted = Wanted(NumberFormat(form))
    convert(plan_conversion(open_source(tmp_path / "published"), tmp_path / "target", wanted))
    policy, source = wanted.policy(spec), open_source(tmp_path / "target")
    assert policy is not None and load_spec(tmp_path / "target") == spec
    before = dict(read_hf(tmp_path / "published"))
    rounded: dict[str, Tensor] = {}
    for name, weight in source.weights.items():
        parts = {part: source.reader.read(entry) for part, entry in weight.parts.items()}
        rounded[name] = as_numbers(weight, parts, torch.float32)
        target = policy.storage(name)
        exact = before[name].float()
        expected = exact if target.is_plain else dequantised(quantised(target, exact))
        assert torch.equal(rounded[name], expected), name
        assert (".experts." not in name) or not target.is_plain, name
    source.reader.close()
    assert before.keys() == rounded.keys()
    load_published(Decoder(spec), rounded.items(), draft=MtpDraft(spec))


@pytest.mark.parametrize("case", SHIPPING_MTP.values(), ids=SHIPPING_MTP.keys())
def test_an_mtp_layer_predicts_what_transformers_predicts(case: FamilyCase, tmp_path: Path) -> None:
    reference = make_reference(case)
    reference.save_pretrained(tmp_path / "plain")  # type: ignore[operator]
    spec = with_mtp(load_spec(tmp_path / "plain"), 1)
    draft = MtpDraft(spec)
    draft.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if name.endswith("norm") else 0.0)
    decoder = load_decoder(tmp_path / "plain")
    write_hf(tmp_path / "mtp", spec, to_published(decoder, draft), source_dir=tmp_path / "plain")

    again = load_reference(tmp_path / "mtp")
    (tokens,) = sequences(spec.vocab_size, (17,))
    rows, positions = len(tokens) - 1, torch.arange(len(tokens) - 1)
    with torch.no_grad():
        hidden = again.model(tokens[None, :-1]).last_hidden_state  # type: ignore[operator, union-attr]
        layer = _their_layer(again, case, tmp_path / "mtp", spec.num_layers)
        expected = again.lm_head(layer(hidden, tokens[None, 1:], positions[None] + 1))[0]  # type: ignore[operator]
        attention = PackedAttention(torch.tensor([0, rows]))
        trunk = decoder(tokens[:-1], positions, attention, Router.decide())
        logits = draft.logits(draft(trunk, tokens[1:], positions, attention, decoder), decoder)
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() <= 1e-4


def _their_layer(
    model: nn.Module, case: FamilyCase, directory: Path, depth: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """transformers' MTP layer: features of hidden states [1, T, D], following tokens and positions [1, T].

    Where transformers has none, its decoder layer with the published formula around it.
    """
    embed, rotary = model.model.embed_tokens, model.model.rotary_emb  # type: ignore[union-attr]

    def around(tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        rows = tokens.shape[1]
        causal = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        embedded = embed(tokens)  # type: ignore[operator]
        return embedded, causal, rotary(embedded, position_ids=positions)  # type: ignore[operator]

    if case.architecture != "DeepseekV32":
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{depth}.*"]  # type: ignore[assignment]
        theirs = MtpModel.from_pretrained(model).layers[0]

        def run(hidden: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
            embedded, causal, turned = around(tokens, positions)
            return theirs(embedded, hidden, turned, causal, positions, None)

        return run
    config = type(model.config)(**case.config | {"num_hidden_layers": depth + 1})
    deeper = type(model).from_pretrained(directory, config=config, experts_implementation="eager")
    tensors, eps = dict(read_hf(directory)), config.rms_norm_eps

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], tensors[f"model.layers.{depth}.{name}.weight"], eps)

    def plain(hidden: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        embedded, causal, turned = around(tokens, positions)
        mixed = torch.cat((norm(embedded, "enorm"), norm(hidden, "hnorm")), -1)
        mixed = mixed @ tensors[f"model.layers.{depth}.eh_proj.weight"].T
        out = deeper.model.layers[depth](
            mixed, attention_mask=causal, position_embeddings=turned, position_ids=positions
        )
        return norm(out, "shared_head.norm")

    return plain


def test_a_copy_that_differs_from_the_models_table_is_refused(tmp_path: Path) -> None:
    spec = make_checkpoint(ONE_OF_EACH["glm4_moe"], tmp_path, mtp_layers=1)
    tensors = dict(read_hf(tmp_path / "published"))
    name = f"model.layers.{spec.num_layers}.shared_head.head.weight"
    with pytest.raises(CheckpointError, match=rf"{name} differs from lm_head.weight"):
        load_published(Decoder(spec), (tensors | {name: tensors[name] + 1}).items(), draft=MtpDraft(spec))
    del tensors[name]
    load_published(Decoder(spec), tensors.items(), draft=MtpDraft(spec))
